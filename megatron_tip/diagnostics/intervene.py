"""Live intervention: train with each rule from the same start at the same budget, measure the gain on other contexts.

TA-OPD tables 2, 7, 8 and 10. Selection and loss are the training step's own. Contexts are frozen, so the teacher scores
them once, and so does the start, whose statistics all steps of an arm select by.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.config import Config
from megatron_tip.cpu.heap import return_freed_memory
from megatron_tip.diagnostics.arms import Arm, ArmResult, ArmsFile, planned_arms, settings_digest
from megatron_tip.diagnostics.bank import ContextBank, warn_of_strangers
from megatron_tip.diagnostics.measure import FrozenContexts, forward_kl, freeze, score_contexts, score_supports
from megatron_tip.diagnostics.scores import about_in, scores_of, write_scores
from megatron_tip.diagnostics.session import Subject
from megatron_tip.diagnostics.snapshot import StudentStart
from megatron_tip.errors import InputError, NotFiniteError
from megatron_tip.parallel.together import run_on
from megatron_tip.planning.intervention_memory import KeptTokens, estimate_intervention
from megatron_tip.planning.memory_estimate import MemoryEstimate
from megatron_tip.planning.settings import make_selector
from megatron_tip.statistics import TokenStatistics
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.step import select_then_train
from megatron_tip.training.step_metrics import supervision_metrics
from megatron_tip.training.supervision import Scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """A seed's contexts: those of each training step, and held-out ones of other prompts."""

    steps: list[list[int]]
    heldout: list[int]

    @property
    def trained(self) -> list[int]:
        return sorted(place for step in self.steps for place in step)


@dataclass(frozen=True)
class SeedState:
    """State shared by a seed's arms: frozen contexts, the start's statistics by step and K, its KL on `heldout`."""

    split: Split
    steps: list[FrozenContexts]
    statistics: list[dict[int, TokenStatistics]]
    heldout: FrozenContexts
    before: Tensor


def split_contexts(bank: ContextBank, *, num_steps: int, per_step: int, num_heldout: int, seed: int) -> Split:
    """Returns a seeded split by prompt: no prompt is both trained and measured on. A pure function.

    Raises:
        InputError: the bank has too few contexts, or `num_heldout` is 0.
    """
    if num_heldout < 1:
        raise InputError(
            f"heldout.num_prompts: expected at least 1 context to measure an arm on, got {num_heldout}; set it"
        )
    prompts = np.random.default_rng(seed).permutation(bank.prompts.max() + 1)
    num_trained, count = num_steps * per_step, len(prompts)
    held = np.cumsum(np.bincount(bank.prompts, minlength=count)[prompts])  # contexts of the first prompts
    fitting = [m for m in range(1, count) if held[m - 1] >= num_trained and held[-1] - held[m - 1] >= num_heldout]
    if not fitting:
        raise InputError(
            f"diagnostics.bank: expected {num_trained} contexts to train on (training.steps x rollout.prompts_per_step "
            f"x samples_per_prompt) and {num_heldout} of other prompts to measure on (heldout.num_prompts), got "
            f"{len(bank.contexts)} contexts of {count} prompts; lower them or make a larger bank"
        )
    # As many prompts as possible on either side: a result on one prompt says nothing about others.
    num_prompts = max(fitting, key=lambda m: (min(m / num_trained, (count - m) / num_heldout, 1.0), -m))
    trained = _in_turn(bank, prompts[:num_prompts])[:num_trained]
    heldout = _in_turn(bank, prompts[num_prompts:])[:num_heldout]
    steps = [trained[start : start + per_step] for start in range(0, num_trained, per_step)]
    return Split(steps, heldout)


def _in_turn(bank: ContextBank, prompts: np.ndarray) -> list[int]:
    """Returns the contexts of `prompts`: the first of each, then the second of each, and so on."""
    own = (np.flatnonzero(bank.prompts == prompt).tolist() for prompt in prompts)
    return [place for round_ in zip_longest(*own) for place in round_ if place is not None]


def split_of(config: Config, bank: ContextBank, seed: int) -> Split:
    """Returns the configured split."""
    rollout = config.rollout
    return split_contexts(
        bank,
        num_steps=config.training.steps,
        per_step=rollout.prompts_per_step * rollout.samples_per_prompt,
        num_heldout=config.heldout.num_prompts,
        seed=seed,
    )


def intervene(run: TrainingRun, subject: Subject, file: ArmsFile) -> None:
    """Runs every arm that `file` does not hold yet; scores the whole bank after each plain distillation.

    An arm whose loss or gradient is not finite is logged and left out. Collective over the world; rank 0 writes. The
    caller has run `check_arms`.
    """
    config, bank = run.config, subject.bank
    warn_of_strangers(bank, student=subject.student, teacher=subject.teacher)

    def begin() -> list[str]:
        file.begin(comparable_settings(config, subject))
        return [str(result.arm) for result in file.read()]

    arms, done = planned_arms(config), run_on(0, begin, device=run.device)
    todo = [arm for arm in arms if str(arm) not in done]
    start = StudentStart(run.student)
    states: dict[int, SeedState] = {}
    whole = None
    for arm in todo:
        if run.device.type == "cpu":  # arms cut their sequences at different lengths, which can fragment the heap
            return_freed_memory()
        if arm.rule != "full":  # plain distillations come first
            whole = None
        if arm.seed not in states:
            start.restore()
            states[arm.seed] = prepare_seed(run, bank, split_of(config, bank, arm.seed))
        state = states[arm.seed]
        try:
            result = run_arm(run, start, state, arm)
        except NotFiniteError as error:  # on every rank
            logger.warning("%s is left out: %s", arm, error)
            continue
        if arm.rule == "full":
            run.enter("measure")
            whole = whole or freeze(run, bank.contexts)
            score_after(run, subject, whole, state.split, arm)
        if dist.get_rank() == 0:
            file.append(result)
            _log(result, f"{len(done) + 1} of {len(arms)}")
        done.append(str(arm))


def _log(result: ArmResult, place: str) -> None:
    seconds = result.cpu_seconds, time.process_time()
    logger.info("%s: %s: G %+.4f; %.1f s of CPU, %.0f since the start", place, result.arm, result.gain, *seconds)


def check_arms(config: Config, subject: Subject, file: ArmsFile) -> None:
    """Refuses invalid arms, splits and folders of arms before anything is built. Reads no weights.

    Raises:
        ConfigError: an invalid rule or budget; arms with other settings. InputError: too few contexts; damaged arms;
            scores of another intervention in the bank, which this one would replace.
    """
    for arm in planned_arms(config):
        make_selector(config_of(config, arm))
    settings = comparable_settings(config, subject)
    file.check(settings)
    digest = settings_digest(settings)
    for seed in range(1, config.diagnostics.seeds + 1):
        split_of(config, subject.bank, seed)
        path = subject.bank.scores_path(f"full_seed{seed}")
        if path.exists() and about_in(path).get("settings", digest) != digest:
            raise InputError(
                f"{path}: expected no scores of an intervention with other settings, got some; copy "
                "the bank for this one (diagnostics.bank), or remove them"
            )


def estimate_arms(config: Config, subject: Subject, *, memory_gib: float, on_gpu: bool) -> MemoryEstimate:
    """Returns the memory that the intervention takes on the rank that needs the most; reads no weights."""
    bank = subject.bank
    splits = [split_of(config, bank, seed) for seed in range(1, config.diagnostics.seeds + 1)]
    trained, heldout = (
        sum(bank.contexts[place].num_generated for split in splits for place in places(split))
        for places in (lambda split: split.trained, lambda split: split.heldout)
    )
    kept = KeptTokens(by_seed=trained + heldout, trained=trained, bank=len(bank.rows))
    return estimate_intervention(config, subject.plan, kept, memory_gib=memory_gib, on_gpu=on_gpu)


def score_checkpoint(run: TrainingRun, subject: Subject, name: str, *, is_start: bool) -> None:
    """Scores the loaded student and writes scores/`name`.parquet. Collective; rank 0 writes."""
    bank, sizes = subject.bank, run.config.diagnostics.support_sizes
    if is_start:
        warn_of_strangers(bank, student=subject.student, teacher=subject.teacher)
    columns = score_contexts(run, freeze(run, bank.contexts), sizes)
    if dist.get_rank() == 0:
        values = {column: tensor.numpy() for column, tensor in columns.items()}
        write_scores(bank.scores_path(name), scores_of(bank, values, about_scores(run.config, subject, sizes)))
        logger.info("%s: KL(teacher || student) %.4f nats per token", name, values["forward_kl"].mean())


def prepare_seed(run: TrainingRun, bank: ContextBank, split: Split) -> SeedState:
    """Scores a seed's contexts with the teacher and the start. Collective over the world."""
    run.enter("measure")
    sizes = sorted({run.config.selection.support_size, *run.config.diagnostics.support_sizes})
    steps = [freeze(run, [bank.contexts[place] for place in step]) for step in split.steps]
    statistics = [score_supports(run, frozen, sizes) for frozen in steps]
    heldout = freeze(run, [bank.contexts[place] for place in split.heldout])
    return SeedState(split, steps, statistics, heldout, forward_kl(run, heldout))


def run_arm(run: TrainingRun, start: StudentStart, state: SeedState, arm: Arm) -> ArmResult:
    """Trains from the start by the arm's rule; measures the gain on the held-out contexts. Collective."""
    began = time.process_time()
    start.restore()
    arm_run = replace(run, config=config_of(run.config, arm), selector=make_selector(config_of(run.config, arm)))
    metrics = []
    for step, (frozen, statistics) in enumerate(zip(state.steps, state.statistics, strict=True), start=1):
        metrics.append(train_arm_step(arm_run, frozen, statistics.get(arm.support_size), step))
    run.enter("score")
    after = forward_kl(run, state.heldout)
    lengths = [context.num_generated for context in state.heldout.batch.rollouts]
    return ArmResult(
        arm=arm,
        trained_contexts=state.split.trained,
        contexts=state.split.heldout,
        num_tokens=lengths,
        before=_sums(state.before, lengths),
        after=_sums(after, lengths),
        num_valid=sum(int(values["selection/num_valid"]) for values in metrics),
        num_selected=sum(int(values["selection/num_selected"]) for values in metrics),
        metrics=_means(metrics),
        cpu_seconds=time.process_time() - began,
    )


def train_arm_step(
    run: TrainingRun, frozen: FrozenContexts, statistics: TokenStatistics | None, step: int
) -> dict[str, float]:
    """Takes one optimizer step on the selected tokens of frozen contexts; returns metrics, the same on every rank."""
    trained = select_then_train(run, Scored(frozen.batch, frozen.teacher_rows, statistics, None), step)
    metrics = supervision_metrics(run.student.groups, trained, pass_seconds=0.0)
    run.enter("update")
    return metrics | run.student.apply_gradients(step)


def config_of(config: Config, arm: Arm) -> Config:
    """Returns the run's configuration with the arm's selection; the budget is per step, for every rule."""
    is_own = arm.rule == config.selection.rule
    selection = config.selection.model_copy(
        update={
            "rule": arm.rule,
            "retention_ratio": arm.retention_ratio,
            "support_size": arm.support_size,
            "scope": "batch",
            "parameters": config.selection.parameters if is_own else {},
            "adaptive_ratio": False,
            "compare": False,
        }
    )
    run = config.run.model_copy(update={"seed": config.run.seed + arm.seed})
    return config.model_copy(update={"selection": selection, "run": run})


def score_after(run: TrainingRun, subject: Subject, whole: FrozenContexts, split: Split, arm: Arm) -> None:
    """Scores the trained student on the `whole` bank: scores/full_seed1.parquet. Collective over the world."""
    columns = score_contexts(run, whole, [arm.support_size])
    if dist.get_rank() == 0:
        about = about_scores(run.config, subject, [arm.support_size])
        about |= {name: f"{about[name]}, then {arm}" for name in ("checkpoint", "student")}
        bank = subject.bank
        about["settings"] = settings_digest(comparable_settings(run.config, subject))
        about["trained_contexts"] = np.flatnonzero(np.isin(bank.prompts, bank.prompts[split.trained])).tolist()
        values = {name: column.numpy() for name, column in columns.items()}
        write_scores(bank.scores_path(f"full_seed{arm.seed}"), scores_of(bank, values, about))


def about_scores(config: Config, subject: Subject, support_sizes: Sequence[int]) -> dict[str, Any]:
    """Returns the description of a file of scores."""
    return {
        "checkpoint": str(subject.checkpoint or config.model.path),
        "student": subject.student,
        "teacher": subject.teacher,
        "temperature": config.loss.temperature,
        "support_sizes": list(support_sizes),
    }


def comparable_settings(config: Config, subject: Subject) -> dict[str, Any]:
    """Returns the settings that two arms must share to be compared."""
    rollout = config.rollout
    return {
        "bank": subject.bank.sha256,
        "student": subject.student,
        "teacher": subject.teacher,
        "steps": config.training.steps,
        "contexts_per_step": rollout.prompts_per_step * rollout.samples_per_prompt,
        "heldout_contexts": config.heldout.num_prompts,
        "seed": config.run.seed,
        "dtype": [config.model.dtype, config.teacher.dtype],
        "optimizer": config.optimizer.model_dump(),
        "loss": config.loss.model_dump(exclude={"chunk_rows"}),
        "tie_break": config.selection.tie_break,
        "normaliser": config.selection.normaliser,
        "loss_scale": config.selection.loss_scale,
    }


def _means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns each metric's mean over the steps that have it."""
    names = sorted(set().union(*steps))
    return {name: float(np.mean([values[name] for values in steps if name in values])) for name in names}


def _sums(values: Tensor, lengths: Sequence[int]) -> list[float]:
    return [float(part.double().sum()) for part in torch.split(values, list(lengths))]
