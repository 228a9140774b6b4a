"""One training step as named stages: rollout, teacher, score, select, train."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import NotFiniteError, TrainingError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.records import Prompt, Rollout, TokenIndex, TokenSelection, TokenStatistics
from megatron_tip.rollout.broadcast import broadcast_rollouts
from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.rollout.step_batch import StepBatch
from megatron_tip.rollout.storage import write_rollouts
from megatron_tip.training.metrics import rollout_metrics, supervision_metrics
from megatron_tip.training.run import TrainingRun
from megatron_tip.vocab_parallel import divergence_loss, token_statistics

logger = logging.getLogger(__name__)

SKIPPED_NOT_FINITE = "train/skipped_not_finite"
"""The metric, 1, of a step that updated nothing because its loss or gradient was not finite."""

_NOT_FINITE = -2
"""In the place of a last selected position: the statistics are not finite."""


@dataclass(frozen=True)
class Supervision:
    """What one replica trains on after selection.

    `batch`: its replica 0 holds the micro-batches, cut behind the last selected tokens; equal on all tp and pp ranks.
    `rows`: by micro-batch, the places of its rows among the replica's scored rows. `selection`: over the scored rows,
    on the last stage; None elsewhere.
    """

    batch: StepBatch
    rows: list[Tensor]
    selection: TokenSelection | None


def train_step(run: TrainingRun, step: int) -> dict[str, float]:
    """Runs step `step` (from 1) and returns its metrics, equal on every rank. Collective over the world.

    The engine holds the weights of the step before, and still does so afterwards: `weight_sync.update_engine` is next.

    A step whose loss or gradient is not finite updates nothing; its metrics hold SKIPPED_NOT_FINITE, and its rollouts
    are kept in skipped/, for the replay engine.

    Raises:
        TrainingError: rollouts of other weights than the last; nothing was updated.
        StopRequested: the run was told to stop while it generated; nothing was updated.
    """
    with run.timer.phase("rollout"):
        prompts = run.prompts.batch(step) if run.prompts else []
        rollouts = generate_rollouts(run, prompts, run.sampling.for_step(step))
    metrics = rollout_metrics(rollouts, weight_version=step - 1)
    if metrics["rollout/num_stale"] and run.config.rollout.engine != "replay":
        raise TrainingError(
            f"step {step}: expected rollouts of weight version {step - 1}, got {rollouts[0].weight_version} in "
            f"{metrics['rollout/num_stale']:.0f} of {len(rollouts)}; the engine did not take the last weights"
        )
    batch = run.batch_of(rollouts)
    if not batch.num_valid():
        return {**metrics, "train/skipped_no_valid_token": 1.0}
    try:
        metrics |= learn(run, batch, step)
    except NotFiniteError as error:
        if run.engine is not None:
            logger.warning("step %d is skipped, its rollouts are in skipped/: %s", step, error)
            write_rollouts(RunFolder(run.config.run.folder).skipped, f"step_{step:06d}", rollouts, prompts)
        metrics |= {SKIPPED_NOT_FINITE: 1.0}
    return metrics


def learn(run: TrainingRun, batch: StepBatch, step: int) -> dict[str, float]:
    """Teacher, scoring, selection and the optimizer's step on one batch; returns their metrics.

    Raises:
        NotFiniteError: hidden states, logits, loss or gradient are not; nothing was updated. On every rank.
    """
    timer = run.timer
    with timer.phase("teacher"):
        teacher_rows = run.teacher.hidden_rows(batch)
    with timer.phase("score"):
        statistics = score_tokens(run, batch, teacher_rows) if run.selector.required_statistics else None
    with timer.phase("select"):
        supervision = select_tokens(run, batch, statistics, step)
    run.views.capture(step, batch, statistics, supervision.selection)
    with timer.phase("train"):
        loss = accumulate_gradients(run, supervision, teacher_rows)
        metrics = supervision_metrics(
            run.student.groups,
            scored=batch,
            trained=supervision.batch,
            statistics=statistics,
            selection=supervision.selection,
            loss=loss,
            device=run.device,
        )
        if not math.isfinite(metrics["train/loss"]):
            raise NotFiniteError(f"step {step}: expected a finite loss, got {metrics['train/loss']}")
        return metrics | run.student.apply_gradients(step)


def generate_rollouts(run: TrainingRun, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
    """The engine's responses, on every rank; empty responses are left in and have no valid token."""

    def generate() -> list[Rollout]:
        assert run.engine is not None, "the engine lives in the first process"
        with run.stop.interruptible():
            rollouts = run.engine.generate(prompts, sampling)
        if run.config.output.save_rollouts:
            write_rollouts(RunFolder(run.config.run.folder).rollouts, sampling.batch_name, rollouts, prompts)
        return rollouts

    return broadcast_rollouts(generate, device=run.device)


def score_tokens(run: TrainingRun, batch: StepBatch, teacher_rows: Tensor | None) -> TokenStatistics | None:
    """Statistics of every valid token of this rank's replica, in the order of its rows; on the last stage only.

    One forward pass without gradient. What is alive at once is a micro-batch's hidden states and a chunk of logits.
    """
    groups, config = run.student.groups, run.config
    micro_batches = batch.micro_batches(groups.dp_rank)
    row_counts = batch.num_rows()[groups.dp_rank]
    teacher_parts = teacher_rows.split(row_counts) if teacher_rows is not None else ()
    parts: list[TokenStatistics] = []

    def score(index: int, hidden_states: Tensor) -> None:
        micro_batch = micro_batches[index]
        try:
            statistics = token_statistics(
                run.student.rows(hidden_states, micro_batch.loss_mask),
                run.student.output_head,
                teacher_parts[index],
                run.teacher.head,
                labels=micro_batch.labels[micro_batch.loss_mask],
                support_size=config.selection.support_size,
                vocab_size=run.vocab_size,
                temperature=config.loss.temperature,
                tp_group=groups.tp_group,
                chunk_rows=config.loss.chunk_rows or None,
                with_jsd="jsd" in run.selector.required_statistics,
            )
        except NotFiniteError:  # alike on all tp ranks; the other replicas and stages must not be left alone
            statistics = TokenStatistics.unknown(row_counts[index], run.device)
        parts.append(statistics)

    run.student.forward(micro_batches, score)
    return TokenStatistics.concatenate(parts) if groups.is_last_stage else None


def select_tokens(run: TrainingRun, batch: StepBatch, statistics: TokenStatistics | None, step: int) -> Supervision:
    """Chooses the tokens on the last stage, tells the other stages, and cuts the batch behind them.

    Raises:
        NotFiniteError: statistics that the rule needs are not finite; on every rank.
    """
    groups = run.student.groups
    last_selected = torch.full((len(batch.rollouts),), -1, dtype=torch.int64, device=run.device)
    selection, failure = None, None
    if groups.is_last_stage:
        index = batch.token_index(groups.dp_rank)
        try:
            selection = run.selector.select(statistics, index, step=step, dp_group=groups.dp_group)
            last_selected = last_selected_positions(index, selection.selection_mask, last_selected)
        except NotFiniteError as error:  # on the last stage of every replica
            failure = error
            last_selected.fill_(_NOT_FINITE)
    if groups.grid.pp_size > 1:
        dist.broadcast(last_selected, src=groups.last_stage_rank, group=groups.pp_group)
    if _NOT_FINITE in last_selected:
        raise failure or NotFiniteError(f"step {step}: the last stage's statistics are not finite")
    cut, rows = batch.cut_behind(last_selected.tolist(), groups.dp_rank)
    return Supervision(cut, rows, selection)


def last_selected_positions(index: TokenIndex, selection_mask: Tensor, initial: Tensor) -> Tensor:
    """`[rollouts]` int64: each rollout's last selected response position, `initial` where there is none."""
    return initial.scatter_reduce(0, index.rollout_index[selection_mask], index.position[selection_mask], "amax")


def accumulate_gradients(run: TrainingRun, supervision: Supervision, teacher_rows: Tensor | None) -> float:
    """Forward and backward over the selected tokens; returns this replica's part of the loss, 0 off the last stage.

    The LM head is applied, with gradient, to the selected rows only.
    """
    groups, config = run.student.groups, run.config
    micro_batches = supervision.batch.micro_batches(0)
    total = torch.zeros((), device=run.device)

    def loss_of(index: int, hidden_states: Tensor) -> Tensor:
        micro_batch, selection = micro_batches[index], supervision.selection
        assert selection is not None, "the loss is taken on the last stage"
        assert teacher_rows is not None, "the loss is taken on the last stage"
        rows = supervision.rows[index]
        rows = rows[selection.selection_mask[rows]]
        mask = selected_positions(micro_batch.loss_mask, selection.selection_mask[supervision.rows[index]])
        try:
            loss = divergence_loss(
                run.student.rows(hidden_states, mask),
                run.student.output_head,
                teacher_rows[rows],
                run.teacher.head,
                divergence=config.loss.divergence,
                row_weights=selection.row_weights[rows],
                labels=micro_batch.labels[mask],
                vocab_size=run.vocab_size,
                temperature=config.loss.temperature,
                jsd_beta=config.loss.jsd_beta,
                tp_group=groups.tp_group,
                chunk_rows=config.loss.chunk_rows or None,
            )
        except NotFiniteError:  # the schedule goes on, for the other ranks' sake; the loss tells all of them
            loss = hidden_states.sum() * float("nan")
        total.add_(loss.detach())
        return loss

    run.student.accumulate_gradients(micro_batches, loss_of)
    return total.item()


def selected_positions(loss_mask: Tensor, row_is_selected: Tensor) -> Tensor:
    """`[b, s]` bool: `loss_mask` without the rows that were not selected."""
    mask = loss_mask.clone()
    mask[loss_mask] = row_is_selected
    return mask
