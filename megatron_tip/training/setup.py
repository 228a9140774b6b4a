"""From a checked plan to a run that can take its first step."""

import torch
from transformers import AutoConfig

from megatron_tip.config import Config
from megatron_tip.conversion.bridge import load_hf, load_output_head
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.errors import InputError
from megatron_tip.models.gpt import build_gpt
from megatron_tip.models.student import Student, build_student
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import Worker
from megatron_tip.parallel.groups import ModelGroups, build_groups
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.plan import RunPlan
from megatron_tip.prompts.source import PromptSource, load_prompts
from megatron_tip.rollout.ahead import AheadGenerator
from megatron_tip.rollout.embedded.engine import EmbeddedEngine
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams
from megatron_tip.rollout.multi_turn import with_environment
from megatron_tip.rollout.replay_engine import ReplayEngine
from megatron_tip.rollout.sglang.setup import build_sglang_engine
from megatron_tip.teachers.megatron import Teacher
from megatron_tip.teachers.served import ServedTeacher
from megatron_tip.teachers.setup import build_server_teacher
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.token_views import TokenViews
from megatron_tip.vocab_parallel import padded_vocab_size


def build_run(
    config: Config, plan: RunPlan, worker: Worker, timer: PhaseTimer, *, num_threads: int, generates: bool = True
) -> TrainingRun:
    """Builds models, optimizer, prompts and engine. Collective over the world.

    Args:
        generates: False: without prompts and engine, for work on rollouts that are there.
        num_threads: CPU threads of all workers of this machine together, which the embedded engine may use while the
            others wait for it.
    """
    student_groups = build_groups(plan.student_grid)
    teacher_groups = build_groups(plan.teacher_grid) if plan.teacher_grid != plan.student_grid else student_groups
    engine = _multi_turn_engine(config, plan, worker, num_threads) if worker.rank == 0 and generates else None
    return TrainingRun(
        config=config,
        device=worker.device,
        student=_student(config, plan, student_groups),
        teacher=_served_teacher(config, plan, student_groups, worker.device)
        if plan.teacher is None
        else _teacher(config, plan, plan.teacher, teacher_groups, student_groups, worker.device),
        architecture=plan.student.architecture,
        vocab_size=plan.vocab_size,
        selector=plan.selector,
        sampling=SamplingParams(
            max_response_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            samples_per_prompt=config.rollout.samples_per_prompt,
            stop_token_ids=plan.stop_token_ids,
            seed=config.run.seed,
        ),
        pad_token_id=plan.pad_token_id,
        prompts=_prompts(config, plan) if worker.rank == 0 and generates else None,
        engine=engine,
        timer=timer,
        ahead=AheadGenerator(engine) if engine is not None and config.rollout.ahead else None,
        views=TokenViews(config, plan.tokenizer, student_groups),
    )


def _student(config: Config, plan: RunPlan, groups: ModelGroups) -> Student:
    model = build_gpt(
        plan.student.architecture,
        groups,
        padded_vocab_size=plan.padded_vocab_size,
        dtype=Dtypes.of(config).student,
        transformer_impl=config.model.transformer_impl,
        sequence_parallel=config.model.sequence_parallel,
        recompute_activations=config.model.recompute_activations,
    )
    load_hf(model, plan.student, groups)
    return build_student(model, groups, config.optimizer, num_steps=config.training.steps)


def _served_teacher(config: Config, plan: RunPlan, groups: ModelGroups, device: torch.device) -> ServedTeacher:
    asks = groups.is_last_stage and groups.tp_rank == 0
    return ServedTeacher(
        scorer=build_server_teacher(config, vocab_size=plan.vocab_size) if asks else None,
        groups=groups,
        device=device,
        support_size=min(config.selection.support_size, plan.vocab_size),
        asks_student_support=config.teacher.student_support == "ask",
        vocab_size=plan.vocab_size,
        chunk_rows=config.loss.chunk_rows or None,
        compiled=config.loss.compile,
    )


def _teacher(
    config: Config,
    plan: RunPlan,
    checkpoint: HfCheckpoint,
    groups: ModelGroups,
    student_groups: ModelGroups,
    device: torch.device,
) -> Teacher:
    architecture, dtype = checkpoint.architecture, Dtypes.of(config).teacher
    model = build_gpt(
        architecture,
        groups,
        padded_vocab_size=padded_vocab_size(architecture.vocab_size, groups.grid.tp_size),
        dtype=dtype,
        transformer_impl=config.teacher.transformer_impl,
        trainable=False,
    )
    load_hf(model, checkpoint, groups)
    output_head = None
    if student_groups.is_last_stage:
        output_head = load_output_head(
            checkpoint,
            tp_rank=student_groups.tp_rank,
            tp_size=student_groups.grid.tp_size,
            padded_vocab_size=plan.padded_vocab_size,
            dtype=dtype,
        ).to(device)
    return Teacher(model, groups, student_groups, architecture.hidden_size, output_head)


def _prompts(config: Config, plan: RunPlan) -> PromptSource:
    source = load_prompts(
        config.prompts,
        config.heldout,
        plan.tokenizer,
        prompts_per_step=config.rollout.prompts_per_step,
        steps=config.training.steps,
        seed=config.run.seed,
    )
    if config.prompts.teacher_field:
        known = sorted({name for name, _ in config.teacher.routes})
        for prompt in (*source.training, *source.heldout):
            if prompt.teacher not in known:
                raise InputError(
                    f"prompt {prompt.index}: expected {config.prompts.teacher_field!r} to be a name of teacher.urls "
                    f"({', '.join(known)}), got {prompt.teacher!r}"
                )
    return source


def _multi_turn_engine(config: Config, plan: RunPlan, worker: Worker, num_threads: int) -> RolloutEngine:
    engine = _engine(config, plan, worker, num_threads)
    return with_environment(engine, config.rollout, plan.tokenizer, plan.stop_token_ids)


def _engine(config: Config, plan: RunPlan, worker: Worker, num_threads: int) -> RolloutEngine:
    if config.rollout.engine == "replay":
        assert config.rollout.replay_folder is not None, "checked by the configuration"
        replay = ReplayEngine(config.rollout.replay_folder)
        replay.health()
        return replay
    dtypes = Dtypes.of(config)
    if config.rollout.engine == "sglang":
        return build_sglang_engine(
            config,
            plan.student,
            dtype=dtypes.engine,
            weights_dtype=dtypes.student,
            device=worker.device,
        )
    return EmbeddedEngine(
        AutoConfig.for_model(**plan.student.config),
        dtype=dtypes.engine,
        device=worker.device,
        batch_size=config.rollout.batch_size,
        num_threads=num_threads,
        vocab_size=plan.vocab_size,
    )
