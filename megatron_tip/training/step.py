"""One training step as named stages: rollout, teacher, score, select, train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.errors import NotFiniteError, TrainingError
from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.records import MicroBatch, TeacherRows, TeacherTopK, TokenSelection, TokenStatistics
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.selection import Calibration
from megatron_tip.teachers.megatron import Teacher
from megatron_tip.teachers.served import known_rows, served_loss
from megatron_tip.training.importance import log_ratios, with_importance
from megatron_tip.training.rollouts import keep_skipped, training_rollouts
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.scoring import ask_teacher, score_tokens
from megatron_tip.training.step_metrics import rollout_metrics, supervision_metrics
from megatron_tip.training.supervision import MicroBatchRows, SelectedRows, SelectedWhileTraining, Supervise
from megatron_tip.vocab_parallel import divergence_loss

SKIPPED_NOT_FINITE = "train/skipped_not_finite"
"""The metric, 1, of a step that updated nothing because its loss or gradient was not finite."""


@dataclass(frozen=True)
class Trained:
    """What a training pass leaves besides gradients.

    `batch`: as it went through the pass, over all replicas. `loss`: this replica's part, 0 off the last stage.
    `statistics`, `selection`: of this replica's scored rows, on the last stage; None elsewhere, `statistics` also where
    the rule asks for none. `ratios`: of the same rows, ln p_student - ln p_rollout of the label; None where not known
    or not at one temperature.
    """

    batch: StepBatch
    loss: float
    statistics: TokenStatistics | None
    selection: TokenSelection | None
    ratios: Tensor | None


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
        rollouts = training_rollouts(run, step)
    metrics = rollout_metrics(rollouts, weight_version=step - 1, ahead=run.config.rollout.ahead)
    if metrics["rollout/num_stale"] and engine_kind(run.config).generates:
        versions = sorted({rollout.weight_version for rollout in rollouts})
        raise TrainingError(
            f"step {step}: expected rollouts of weight version {step - 1}, got versions {versions} among "
            f"{len(rollouts)} rollouts; the engine did not take the last weights"
        )
    batch = run.batch_of(rollouts)
    if not batch.num_valid():
        return {**metrics, "train/skipped_no_valid_token": 1.0}
    try:
        metrics |= learn(run, batch, step)
    except NotFiniteError as error:
        keep_skipped(run, step, rollouts, error)
        metrics |= {SKIPPED_NOT_FINITE: 1.0}
    return metrics


def learn(run: TrainingRun, batch: StepBatch, step: int) -> dict[str, float]:
    """Teacher, scoring, selection and the optimizer's step on one batch; returns their metrics.

    Raises:
        NotFiniteError: hidden states, logits, loss or gradient are not; nothing was updated. On every rank.
    """
    timer = run.timer
    with timer.phase("teacher"):
        teacher_rows = ask_teacher(run, batch)
    one_pass = run.selector.selects_in_one_pass(run.last_step.calibration)
    trained = (select_while_training if one_pass else select_then_train)(run, batch, teacher_rows, step)
    run.views.capture(step, batch, trained.statistics, trained.selection)
    pass_seconds = timer.seconds("train")
    with timer.phase("train"):
        metrics = supervision_metrics(
            run.student.groups,
            scored=batch,
            trained=trained.batch,
            statistics=trained.statistics,
            selection=trained.selection,
            ratios=trained.ratios,
            loss=trained.loss,
            pass_seconds=pass_seconds,
            device=run.device,
        )
        if not math.isfinite(metrics["train/loss"]):
            raise NotFiniteError(f"step {step}: expected a finite loss, got {metrics['train/loss']}")
        return metrics | run.student.apply_gradients(step)


def select_then_train(run: TrainingRun, batch: StepBatch, teacher_rows: TeacherRows | None, step: int) -> Trained:
    """Scores every token in a pass of its own, selects, and trains on what the selection leaves of the batch."""
    with run.timer.phase("score"):
        shows = run.views.is_due(step)
        needs_statistics = run.selector.required_statistics or run.config.rollout.importance_cap or shows
        with_support = run.views.shows_support(step)
        statistics = score_tokens(run, batch, teacher_rows, with_support=with_support) if needs_statistics else None
        teacher_rows = known_rows(statistics, teacher_rows)
        ratios = ratios_of(run, batch, statistics)
    return train_on_scored(run, batch, teacher_rows, statistics, ratios, step)


def train_on_scored(
    run: TrainingRun,
    batch: StepBatch,
    teacher_rows: TeacherRows | None,
    statistics: TokenStatistics | None,
    ratios: Tensor | None,
    step: int,
) -> Trained:
    """Selects by the `statistics` of this replica's rows and accumulates the gradients of what is selected."""
    with run.timer.phase("select"):
        selection = select_tokens(run, batch, statistics, ratios, step)
        trained, selected = cut_to_selection(run, batch, selection, teacher_rows)
    with run.timer.phase("train"):
        micro_batches = trained.micro_batches(run.student.groups.dp_rank)
        rows = selected.by_micro_batch(micro_batches) if selected is not None else []
        loss = accumulate_gradients(run, micro_batches, lambda index, *_: rows[index])
    return Trained(trained, loss, statistics, selection, ratios)


def select_while_training(run: TrainingRun, batch: StepBatch, teacher_rows: TeacherRows | None, step: int) -> Trained:
    """Scores and selects within each micro-batch as it trains: one forward pass, over the whole sequences.

    Raises:
        NotFiniteError: a micro-batch's statistics or loss are not finite; on every rank.
    """
    groups = run.student.groups
    statistics, selection, calibration = None, None, None
    with run.timer.phase("train"):
        chooser = SelectedWhileTraining(run, batch, teacher_rows, step) if teacher_rows is not None else None
        micro_batches = batch.micro_batches(groups.dp_rank)
        loss = accumulate_gradients(run, micro_batches, chooser.rows if chooser is not None else None)
        finite = torch.tensor(math.isfinite(loss), dtype=torch.int32, device=run.device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite:
            raise NotFiniteError(f"step {step}: expected finite scores and a finite loss in every micro-batch")
    with run.timer.phase("select"):
        if chooser is not None:
            statistics, selection, calibration = chooser.finish(batch.token_index(groups.dp_rank))
        remember_calibration(run, calibration)
    return Trained(batch, loss, statistics, selection, ratios_of(run, batch, statistics))


def ratios_of(run: TrainingRun, batch: StepBatch, statistics: TokenStatistics | None) -> Tensor | None:
    """`importance.log_ratios` of this replica where student and engine can be compared; None elsewhere."""
    if statistics is None or run.config.rollout.temperature != run.config.loss.temperature:
        return None
    return log_ratios(batch, run.student.groups.dp_rank, statistics)


def select_tokens(
    run: TrainingRun, batch: StepBatch, statistics: TokenStatistics | None, ratios: Tensor | None, step: int
) -> TokenSelection | None:
    """The selection among the rows that this replica scored, on the last stage; None elsewhere.

    Raises:
        NotFiniteError: statistics that the rule needs are not finite; on every rank.
    """
    selection, calibration, failure = None, None, None
    groups = run.student.groups
    if groups.is_last_stage:
        try:
            selection, calibration = run.selector.select_and_calibrate(
                statistics, batch.token_index(groups.dp_rank), step=step, dp_group=groups.dp_group
            )
        except NotFiniteError as error:  # on the last stage of every replica
            failure = error
    failed = torch.tensor(failure is not None, dtype=torch.int32, device=run.device)
    if groups.grid.pp_size > 1:
        dist.broadcast(failed, src=groups.last_stage_rank, group=groups.pp_group)
    if failed:
        raise failure or NotFiniteError(f"step {step}: the last stage's statistics are not finite")
    if selection is not None and run.config.rollout.importance_cap and ratios is not None:
        selection = with_importance(selection, ratios, run.config.rollout.importance_cap)
    remember_calibration(run, calibration)
    return selection


def cut_to_selection(
    run: TrainingRun, batch: StepBatch, selection: TokenSelection | None, teacher_rows: TeacherRows | None
) -> tuple[StepBatch, SelectedRows | None]:
    """The batch without what the selection leaves unused, balanced anew, equal on every rank; and on the last stage
    the selected rows of this replica in it. Collective over the world.
    """
    groups = run.student.groups
    last_selected = torch.full((len(batch.rollouts),), -1, dtype=torch.int64, device=run.device)
    selected = None
    if selection is not None and teacher_rows is not None:
        selected = SelectedRows.of(selection, batch.token_index(groups.dp_rank), teacher_rows)
        last_selected.scatter_reduce_(0, selected.index.rollout_index, selected.index.position, "amax")
        dist.all_reduce(last_selected, op=dist.ReduceOp.MAX, group=groups.dp_group)
    if groups.grid.pp_size > 1:
        dist.broadcast(last_selected, src=groups.last_stage_rank, group=groups.pp_group)
    trained = batch.cut_behind(last_selected.tolist())
    if selected is not None and groups.grid.dp_size > 1:
        selected = selected.sent_to(trained.replica_of()[selected.index.rollout_index], groups.dp_group)
    return trained, selected


def remember_calibration(run: TrainingRun, calibration: Calibration | None) -> None:
    """Keeps the last stage's `calibration` on every stage, if the next step is to reuse it."""
    if run.selector.thresholds == "this_step":
        return
    groups = run.student.groups
    fields = asdict(calibration) if calibration is not None else None
    if groups.grid.pp_size > 1:
        fields = broadcast_json(fields, source=groups.last_stage_rank, device=run.device, group=groups.pp_group)
    run.last_step.calibration = Calibration(**fields) if fields is not None else None


def accumulate_gradients(run: TrainingRun, micro_batches: Sequence[MicroBatch], supervise: Supervise | None) -> float:
    """Forward and backward over the supervised rows; returns this replica's part of the loss, 0 off the last stage.

    The LM head is applied, with gradient, to those rows only.

    Args:
        supervise: which rows they are; asked on the last stage only.
    """
    total = torch.zeros((), device=run.device)

    def loss_of(index: int, hidden_states: Tensor) -> Tensor:
        assert supervise is not None, "the loss is taken on the last stage"
        micro_batch = micro_batches[index]
        try:
            rows = supervise(index, micro_batch, hidden_states)
            loss = row_loss(run, run.student.rows(hidden_states, rows.mask), rows, micro_batch.labels[rows.mask])
        except NotFiniteError:  # the schedule goes on, for the other ranks' sake; the loss tells all of them
            loss = hidden_states.sum() * float("nan")
        total.add_(loss.detach())
        return loss

    run.student.accumulate_gradients(micro_batches, loss_of)
    return total.item()


def row_loss(run: TrainingRun, hidden: Tensor, rows: MicroBatchRows, labels: Tensor) -> Tensor:
    """The loss of supervised rows, summed with their weights: float32 scalar, equal on all tp ranks."""
    loss, teacher, student = run.config.loss, run.teacher, (hidden, run.student.output_head)
    if isinstance(rows.teacher_rows, TeacherTopK):
        return served_loss(
            student, run.vocabulary, rows.teacher_rows, rows.row_weights, labels, divergence=loss.divergence
        )
    assert isinstance(teacher, Teacher), "hidden states come from the teacher at hand"
    return divergence_loss(
        student,
        (rows.teacher_rows, teacher.head),
        run.vocabulary,
        divergence=loss.divergence,
        row_weights=rows.row_weights,
        labels=labels,
        jsd_beta=loss.jsd_beta,
    )
