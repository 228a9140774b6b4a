"""Set-up of a run from a checked plan, ready for its first step."""

import logging
from contextlib import ExitStack
from dataclasses import replace

from megatron_tip.config import Config
from megatron_tip.conversion.bridge import load_hf
from megatron_tip.conversion.model_size import num_parameters
from megatron_tip.errors import ConfigError, InputError
from megatron_tip.machine import Machine
from megatron_tip.models.gpt import build_gpt
from megatron_tip.models.router import set_auxiliary_loss
from megatron_tip.models.student import Student, build_student
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.collectives import gather_json
from megatron_tip.parallel.distributed import Worker
from megatron_tip.parallel.groups import ModelGroups, build_groups
from megatron_tip.parallel.together import run_on, together
from megatron_tip.placement.placement import Placement
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.inputs import read_prompts
from megatron_tip.planning.passes import OnePass, plan_passes
from megatron_tip.planning.phases import releases_memory
from megatron_tip.planning.plan import RunPlan
from megatron_tip.prompts.source import PromptSource, load_prompts
from megatron_tip.prompts.verifier import Verifier
from megatron_tip.rollout.engine import EngineNeeds, SamplingParams
from megatron_tip.rollout.engines import build_engine
from megatron_tip.rollout.handover.exchange import HandleExchange
from megatron_tip.rollout.handover.shared_memory import bucket_limit
from megatron_tip.rollout.progress_clock import Show, show_nothing
from megatron_tip.selection import AdaptiveRatio
from megatron_tip.teachers.setup import build_teacher
from megatron_tip.teachers.teacher import TeacherSite
from megatron_tip.training.device_memory import DeviceMemory
from megatron_tip.training.run import LastStep, RolloutSource, TrainingRun
from megatron_tip.training.token_views import TokenViews
from megatron_tip.vocab_parallel import ShardedVocabulary

logger = logging.getLogger(__name__)


def with_prompts(config: Config, plan: RunPlan, worker: Worker) -> RunPlan:
    """Returns `plan` with the content of the prompt file on rank 0, which alone reads it. Collective over the world.

    Raises:
        ConfigError, InputError: as `read_prompts`, on every rank.
    """
    with together(device=worker.device):
        if worker.rank == 0:
            plan = replace(plan, prompts=read_prompts(config, Machine()))
    return plan


def build_run(
    config: Config,
    plan: RunPlan,
    worker: Worker,
    timer: PhaseTimer,
    *,
    num_threads: int,
    generates: bool = True,
    show_progress: Show = show_nothing,
) -> TrainingRun:
    """Returns the run with its models, optimizer, prompts and engine. Collective over the world.

    Args:
        generates: if False, leaves out prompts and engine, for work on existing rollouts.
        num_threads: CPU threads of all workers on this machine together. The embedded engine uses them all while the
            other workers wait.
        show_progress: shows the progress of a rollout.

    Raises:
        ConfigError: ranks on unequal nodes placed the servers differently.
    """
    timeout = config.fault.collective_timeout_seconds
    student_groups = teacher_groups = build_groups(plan.student_grid, timeout_seconds=timeout)
    if plan.teacher_grid != plan.student_grid:
        teacher_groups = build_groups(plan.teacher_grid, timeout_seconds=timeout)
    vocabulary = ShardedVocabulary(
        vocab_size=plan.vocab_size,
        temperature=config.loss.temperature,
        tp_group=student_groups.tp_group,
        chunk_rows=config.loss.chunk_rows or None,
        kernels=config.loss.kernels,
    )
    exchange, releases = None, generates and releases_memory(config, plan.placement)
    if generates:
        _check_same_placement(plan.placement, worker, releases=releases)
    if generates and set(plan.placement.handing_ranks) - {0}:
        exchange = _exchange(config, plan, worker)
    with ExitStack() as on_failure:
        source = None
        with together(device=worker.device):
            if worker.rank == 0 and generates:
                source = _source(config, plan, worker, num_threads, exchange, show_progress)
                on_failure.callback(source.engine.close)  # given servers get back their memory
                if releases:  # the models are built where the servers have taken their share
                    source.engine.hold_memory(frozenset(), may_start=False)
        student = _student(config, plan, student_groups)
        teacher_site = TeacherSite(
            checkpoint=plan.teacher,
            student=student,
            groups=teacher_groups,
            student_groups=student_groups,
            vocabulary=vocabulary,
            padded_vocab_size=plan.padded_vocab_size,
            required_statistics=plan.selector.required_statistics,
            dtype=Dtypes.of(config).teacher,
            device=worker.device,
        )
        teacher = build_teacher(config, teacher_site)
        one_pass = _one_pass(config, plan, worker)
        on_failure.pop_all()
    return TrainingRun(
        config=config,
        device=worker.device,
        student=student,
        teacher=teacher,
        architecture=plan.student.architecture,
        vocabulary=vocabulary,
        selector=plan.selector,
        one_pass=one_pass,
        sampling=_sampling(config, plan),
        pad_token_id=plan.pad_token_id,
        source=source,
        timer=timer,
        views=TokenViews(config, plan.tokenizer, student_groups),
        exchange=exchange,
        last_step=LastStep(adaptive_ratio=_adaptive_ratio(config)),
        memory=DeviceMemory(student, teacher, worker.device, offload=config.training.offload, moves_servers=releases),
    )


def _adaptive_ratio(config: Config) -> AdaptiveRatio | None:
    return AdaptiveRatio(config.selection.retention_ratio) if config.selection.adaptive_ratio else None


def _exchange(config: Config, plan: RunPlan, worker: Worker) -> HandleExchange:
    """Returns the exchange of weight handles. Collective over the world: buckets are those of rank 0 everywhere."""
    handing = plan.placement.handing_ranks

    def size() -> int:
        model_bytes = num_parameters(plan.student.architecture) * Dtypes.of(config).student.itemsize
        return bucket_limit(config.sync.bucket_bytes, model_bytes, worker.device, num_handing=len(handing))

    return HandleExchange(run_on(0, size, device=worker.device), worker.device, handing)


def _check_same_placement(placement: Placement, worker: Worker, *, releases: bool) -> None:
    """Raises the same ConfigError on all ranks if they would not take part in the same syncs and releases of memory.

    Collective over the world.
    """
    hosts = placement.hosts
    node = f"{hosts.workers_per_node} workers and {len(hosts.gpus)} GPUs"
    own = [list(placement.handing_ranks), releases, node]
    first, *others = gather_json(own, device=worker.device)
    for rank, other in enumerate(others, start=1):
        if other[:-1] != first[:-1]:
            raise ConfigError(
                f"workers: expected the same numbers on all nodes that share GPUs with SGLang servers, got {first[-1]} "
                f"on the node of rank 0, {other[-1]} on that of rank {rank}; start the same number everywhere, or give "
                "rollouts GPUs of their own"
            )


def _one_pass(config: Config, plan: RunPlan, worker: Worker) -> OnePass:
    """Returns which batches take one pass, by the memory of rank 0's device. Collective over the world."""
    memory_gib = run_on(0, lambda: plan.memory_bytes, device=worker.device) / 2**30
    one_pass = plan_passes(config, plan, memory_gib=memory_gib, on_gpu=worker.device.type == "cuda")
    if worker.rank == 0:
        logger.info('selection.passes = "%s": %s', config.selection.passes, one_pass)
    return one_pass


def _sampling(config: Config, plan: RunPlan) -> SamplingParams:
    rollout = config.rollout
    return SamplingParams(
        max_response_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        samples_per_prompt=rollout.samples_per_prompt,
        stop_token_ids=plan.stop_token_ids,
        seed=config.run.seed,
    )


def _student(config: Config, plan: RunPlan, groups: ModelGroups) -> Student:
    model = build_gpt(
        plan.student.architecture,
        groups,
        padded_vocab_size=plan.padded_vocab_size,
        dtype=Dtypes.of(config).student,
        transformer_impl=config.model.transformer_impl,
        sequence_parallel=config.model.sequence_parallel,
        recompute=config.model.recomputed,
    )
    set_auxiliary_loss(model, config.model.moe_aux_loss_coeff)
    load_hf(model, plan.student, groups)
    return build_student(model, groups, config.optimizer, num_steps=config.training.steps)


def _source(
    config: Config, plan: RunPlan, worker: Worker, num_threads: int, exchange: HandleExchange | None, show: Show
) -> RolloutSource:
    dtypes = Dtypes.of(config)
    engine = build_engine(
        EngineNeeds(
            config=config,
            student=plan.student,
            placement=plan.placement,
            vocab_size=plan.vocab_size,
            tokenizer=plan.tokenizer,
            stop_token_ids=plan.stop_token_ids,
            device=worker.device,
            num_threads=num_threads,
            dtype=dtypes.engine,
            weights_dtype=dtypes.student,
            exchange=exchange,
            releases_memory=releases_memory(config, plan.placement),
            show=show,
        )
    )
    prompts, part = _prompts(config, plan), config.heldout.verify
    verifier = Verifier(prompts.heldout_questions, plan.tokenizer, part) if part != "no" else None
    return RolloutSource(prompts, engine, verifier)


def _prompts(config: Config, plan: RunPlan) -> PromptSource:
    source = load_prompts(
        config.prompts,
        config.heldout,
        plan.tokenizer,
        prompts_per_step=config.rollout.prompts_per_step,
        steps=config.training.steps,
        seed=config.run.seed,
        file=plan.prompts,
    )
    if config.prompts.teacher_field:
        known = sorted({name for name, _ in config.teacher.routes})
        for prompt in (*source.training, *source.heldout):
            if prompt.teacher not in known:
                raise InputError(
                    f"prompt {prompt.index}: expected {config.prompts.teacher_field!r} to be a name in teacher.urls "
                    f"({', '.join(known)}), got {prompt.teacher!r}"
                )
    return source
