"""One training step as named stages: rollout, teacher, score, select, train, sync."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import TrainingError, WeightsLostError
from megatron_tip.models.teacher import Teacher
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.records import Prompt, Rollout, TeacherTopK, TokenIndex, TokenSelection, TokenStatistics
from megatron_tip.rollout.broadcast import broadcast_rollouts
from megatron_tip.rollout.engine import SamplingParams, ServedEngine
from megatron_tip.rollout.step_batch import StepBatch
from megatron_tip.rollout.storage import write_rollouts
from megatron_tip.training.importance import log_ratios, with_importance
from megatron_tip.training.metrics import rollout_metrics, supervision_metrics
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.served_teacher import (
    known_rows,
    served_loss,
    served_statistics,
    tell_teachers,
    with_teachers,
)
from megatron_tip.training.weight_sync import sync_engine
from megatron_tip.vocab_parallel import divergence_loss, token_statistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Supervision:
    """What one replica trains on after selection.

    `batch`: its replica 0 holds the micro-batches, cut behind the last selected tokens; equal on all tp and pp ranks.
    `rows`: by micro-batch, the places of its rows among the replica's scored rows. `selection`: over the scored rows,
    on the last stage; None elsewhere. `ratios`: of the same rows, ln p_student - ln p_rollout of the label; None where
    not known or not at one temperature.
    """

    batch: StepBatch
    rows: list[Tensor]
    selection: TokenSelection | None
    ratios: Tensor | None = None


def train_step(run: TrainingRun, step: int) -> dict[str, float]:
    """Runs step `step` (from 1) and returns its metrics, equal on every rank. Collective over the world.

    Raises:
        TrainingError: rollouts of other weights than the last, a loss or gradient that is not finite; nothing was
            updated.
    """
    timer = run.timer
    with timer.phase("rollout"):
        prompts = run.prompts.batch(step) if run.prompts else []
        rollouts = generate_rollouts(run, prompts, run.sampling.for_step(step), weight_version=step - 1)
        start_next_batch(run, step)
    metrics = rollout_metrics(rollouts, weight_version=step - 1, ahead=run.config.rollout.ahead)
    if metrics["rollout/num_stale"] and run.config.rollout.engine != "replay":
        raise TrainingError(
            f"step {step}: expected rollouts of weight version {step - 1}, got {rollouts[0].weight_version} in "
            f"{metrics['rollout/num_stale']:.0f} of {len(rollouts)}; the engine did not take the last weights"
        )
    batch = run.batch_of(rollouts)
    if not batch.num_valid():
        return {**metrics, "train/skipped_no_valid_token": 1.0, **finish_step(run, step)}
    with timer.phase("teacher"):
        teacher_rows = ask_teacher(run, batch)
    with timer.phase("score"):
        needs_statistics = run.selector.required_statistics or run.config.rollout.importance_cap
        statistics = score_tokens(run, batch, teacher_rows) if needs_statistics else None
        teacher_rows = known_rows(statistics, teacher_rows)
    with timer.phase("select"):
        supervision = select_tokens(run, batch, statistics, step)
    with timer.phase("train"):
        loss = accumulate_gradients(run, supervision, teacher_rows)
        metrics |= supervision_metrics(
            run.student.groups,
            scored=batch,
            trained=supervision.batch,
            statistics=statistics,
            selection=supervision.selection,
            ratios=supervision.ratios,
            loss=loss,
            device=run.device,
        )
        if not math.isfinite(metrics["train/loss"]):
            raise TrainingError(
                f"step {step}: expected a finite loss, got {metrics['train/loss']}; nothing was updated"
            )
        metrics |= run.student.apply_gradients(step)
    return metrics | finish_step(run, step)


def finish_step(run: TrainingRun, step: int) -> dict[str, float]:
    """Waits for what is generated ahead, then syncs; returns the metrics of engine and sync. Collective."""
    with run.timer.phase("rollout"):
        if run.ahead:
            run.ahead.wait()  # servers do not change weights in the middle of a batch
    with run.timer.phase("sync"):
        metrics = sync_engine(run, weight_version=step)
    if run.config.rollout.engine != "sglang":
        return metrics
    own = (
        run.engine.take_metrics(run.sampling.for_step(step).batch_name) if isinstance(run.engine, ServedEngine) else {}
    )
    return metrics | broadcast_json(own, source=0, device=run.device)


def start_next_batch(run: TrainingRun, step: int) -> None:
    """With rollout.ahead = 1, has the batch behind `step` generated beside it. No collective."""
    if run.ahead and run.prompts and step < run.config.training.steps:
        run.ahead.start(run.prompts.batch(step + 1), run.sampling.for_step(step + 1))


def generate_rollouts(
    run: TrainingRun, prompts: Sequence[Prompt], sampling: SamplingParams, *, weight_version: int
) -> list[Rollout]:
    """The engine's responses, on every rank; empty responses are left in and have no valid token.

    When the servers lost the weights on the way, all ranks sync those of `weight_version` once more, and generation
    goes on where it was.
    """

    def generate() -> list[Rollout] | None:
        assert run.engine is not None, "the engine lives in the first process"
        try:
            rollouts = (run.ahead.take if run.ahead else run.engine.generate)(prompts, sampling)
        except WeightsLostError as error:
            logger.warning("step of weights %d: %s; syncing them again", weight_version, error)
            return None
        rollouts = with_teachers(rollouts, prompts) if run.config.prompts.teacher_field else rollouts
        if run.config.output.save_rollouts:
            write_rollouts(RunFolder(run.config.run.folder).rollouts, sampling.batch_name, rollouts, prompts)
        return rollouts

    while (rollouts := broadcast_rollouts(generate, device=run.device)) is None:
        sync_engine(run, weight_version=weight_version)
    return tell_teachers(rollouts, device=run.device) if run.config.prompts.teacher_field else rollouts


def ask_teacher(run: TrainingRun, batch: StepBatch) -> Tensor | TeacherTopK | None:
    """What the teacher says of this rank's replica, in the order of its rows: hidden states, or of a teacher behind
    servers log-probabilities. On the last stage; None elsewhere. Collective over the world.
    """
    return run.teacher.hidden_rows(batch) if isinstance(run.teacher, Teacher) else run.teacher.topk_rows(batch)


def score_tokens(
    run: TrainingRun, batch: StepBatch, teacher_rows: Tensor | TeacherTopK | None
) -> TokenStatistics | None:
    """Statistics of every valid token of this rank's replica, in the order of its rows; on the last stage only.

    One forward pass without gradient. What is alive at once is a micro-batch's hidden states and a chunk of logits.
    """
    groups, config, teacher = run.student.groups, run.config, run.teacher
    if not isinstance(teacher, Teacher):
        assert not isinstance(teacher_rows, Tensor), "servers give log-probabilities"
        return served_statistics(run.student, teacher, batch, teacher_rows)
    assert not isinstance(teacher_rows, TeacherTopK), "the teacher at hand gives hidden states"
    micro_batches = batch.micro_batches(groups.dp_rank)
    row_counts = batch.num_rows()[groups.dp_rank]
    teacher_parts = teacher_rows.split(row_counts) if teacher_rows is not None else ()
    parts: list[TokenStatistics] = []

    def score(index: int, hidden_states: Tensor) -> None:
        micro_batch = micro_batches[index]
        parts.append(
            token_statistics(
                run.student.rows(hidden_states, micro_batch.loss_mask),
                run.student.output_head,
                teacher_parts[index],
                teacher.head,
                labels=micro_batch.labels[micro_batch.loss_mask],
                support_size=config.selection.support_size,
                vocab_size=run.vocab_size,
                temperature=config.loss.temperature,
                tp_group=groups.tp_group,
                chunk_rows=config.loss.chunk_rows or None,
                with_jsd="jsd" in run.selector.required_statistics,
            )
        )

    run.student.forward(micro_batches, score)
    return TokenStatistics.concatenate(parts) if groups.is_last_stage else None


def select_tokens(run: TrainingRun, batch: StepBatch, statistics: TokenStatistics | None, step: int) -> Supervision:
    """Chooses the tokens on the last stage, tells the other stages, and cuts the batch behind them."""
    groups = run.student.groups
    last_selected = torch.full((len(batch.rollouts),), -1, dtype=torch.int64, device=run.device)
    selection = ratios = None
    if groups.is_last_stage:
        index = batch.token_index(groups.dp_rank)
        selection = run.selector.select(statistics, index, step=step, dp_group=groups.dp_group)
        ratios = ratios_of(run, batch, statistics)
        if run.config.rollout.importance_cap and ratios is not None:
            selection = with_importance(selection, ratios, run.config.rollout.importance_cap)
        last_selected = last_selected_positions(index, selection.selection_mask, last_selected)
    if groups.grid.pp_size > 1:
        dist.broadcast(last_selected, src=groups.last_stage_rank, group=groups.pp_group)
    cut, rows = batch.cut_behind(last_selected.tolist(), groups.dp_rank)
    return Supervision(cut, rows, selection, ratios)


def ratios_of(run: TrainingRun, batch: StepBatch, statistics: TokenStatistics | None) -> Tensor | None:
    """`importance.log_ratios` of this replica where student and engine can be compared; None elsewhere."""
    if statistics is None or run.config.rollout.temperature != run.config.loss.temperature:
        return None
    return log_ratios(batch, run.student.groups.dp_rank, statistics)


def last_selected_positions(index: TokenIndex, selection_mask: Tensor, initial: Tensor) -> Tensor:
    """`[rollouts]` int64: each rollout's last selected response position, `initial` where there is none."""
    return initial.scatter_reduce(0, index.rollout_index[selection_mask], index.position[selection_mask], "amax")


def accumulate_gradients(
    run: TrainingRun, supervision: Supervision, teacher_rows: Tensor | TeacherTopK | None
) -> float:
    """Forward and backward over the selected tokens; returns this replica's part of the loss, 0 off the last stage.

    The LM head is applied, with gradient, to the selected rows only.
    """
    micro_batches = supervision.batch.micro_batches(0)
    total = torch.zeros((), device=run.device)

    def loss_of(index: int, hidden_states: Tensor) -> Tensor:
        micro_batch, selection = micro_batches[index], supervision.selection
        assert selection is not None, "the loss is taken on the last stage"
        assert teacher_rows is not None, "the loss is taken on the last stage"
        rows = supervision.rows[index]
        rows = rows[selection.selection_mask[rows]]
        mask = selected_positions(micro_batch.loss_mask, selection.selection_mask[supervision.rows[index]])
        hidden, labels = run.student.rows(hidden_states, mask), micro_batch.labels[mask]
        loss = row_loss(run, hidden, teacher_rows[rows], selection.row_weights[rows], labels)
        total.add_(loss.detach())
        return loss

    run.student.accumulate_gradients(micro_batches, loss_of)
    return total.item()


def row_loss(
    run: TrainingRun, hidden: Tensor, teacher_rows: Tensor | TeacherTopK, row_weights: Tensor, labels: Tensor
) -> Tensor:
    """The loss of selected rows, summed with their weights: float32 scalar, equal on all tp ranks."""
    loss, teacher = run.config.loss, run.teacher
    if isinstance(teacher_rows, TeacherTopK):
        assert not isinstance(teacher, Teacher), "servers give log-probabilities"
        return served_loss(run.student, teacher, hidden, teacher_rows, row_weights, labels, divergence=loss.divergence)
    assert isinstance(teacher, Teacher), "hidden states come from the teacher at hand"
    return divergence_loss(
        hidden,
        run.student.output_head,
        teacher_rows,
        teacher.head,
        divergence=loss.divergence,
        row_weights=row_weights,
        labels=labels,
        vocab_size=run.vocab_size,
        temperature=loss.temperature,
        jsd_beta=loss.jsd_beta,
        tp_group=run.student.groups.tp_group,
        chunk_rows=loss.chunk_rows or None,
    )


def selected_positions(loss_mask: Tensor, row_is_selected: Tensor) -> Tensor:
    """`[b, s]` bool: `loss_mask` without the rows that were not selected."""
    mask = loss_mask.clone()
    mask[loss_mask] = row_is_selected
    return mask
