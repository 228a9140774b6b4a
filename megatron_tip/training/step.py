"""The stages of one training step: generate, ask, score, select, train, update.

`run.enter` says where memory moves: what each stage leaves on the device is in `planning.phases.PHASES`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.errors import NotFiniteError, TrainingError
from megatron_tip.models.student import Student
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.parallel.together import run_on
from megatron_tip.records import TeacherRows, TokenSelection
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.teachers.teacher import Teacher
from megatron_tip.training.context_rows import ContextRows
from megatron_tip.training.importance import comparable_ratios, with_importance
from megatron_tip.training.rollouts import keep_skipped, training_rollouts
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.step_metrics import rollout_metrics, supervision_metrics
from megatron_tip.training.supervision import MicroBatchRows, Scored, SelectedRows, Trained

SKIPPED_NOT_FINITE = "train/skipped_not_finite"
"""The metric that is 1 for a step without an update because its loss or gradient was not finite."""
SKIPPED_NO_VALID_TOKEN = "train/skipped_no_valid_token"
"""The metric that is 1 for a step without an update because none of its tokens may be supervised."""


def train_step(run: TrainingRun, step: int) -> dict[str, float]:
    """Runs step `step` (from 1) and returns its metrics, equal on every rank. Collective over the world.

    The engine keeps the previous step's weights until the caller runs `weight_sync.update_engine`.

    A step whose loss or gradient is not finite updates nothing. Its metrics then contain SKIPPED_NOT_FINITE, and its
    rollouts go to skipped/, for the replay engine.

    Raises:
        TrainingError: the rollouts are not from the latest weights; nothing was updated.
        StopRequested: a stop signal arrived during generation; nothing was updated.
    """
    with run.timer.phase("rollout"):
        rollouts = training_rollouts(run, step)
    metrics = rollout_metrics(rollouts, weight_version=step - 1, ahead=run.config.rollout.ahead)
    if metrics["rollout/num_stale"] and engine_kind(run.config).generates:
        versions = sorted({rollout.weight_version for rollout in rollouts})
        raise TrainingError(
            f"step {step}: expected rollouts of weight version {step - 1}, got versions {versions} among "
            f"{len(rollouts)} rollouts; the engine did not load the latest weights"
        )
    batch = run.batch_of(rollouts)
    if not batch.num_valid():
        return {**metrics, SKIPPED_NO_VALID_TOKEN: 1.0}
    try:
        metrics |= learn(run, batch, step)
    except NotFiniteError as error:
        keep_skipped(run, step, rollouts, error)
        metrics |= {SKIPPED_NOT_FINITE: 1.0}
    return metrics


def learn(run: TrainingRun, batch: StepBatch, step: int) -> dict[str, float]:
    """Runs all stages after generation on one batch, updates the weights and returns the metrics.

    Raises:
        NotFiniteError: hidden states, logits, loss or gradient are not finite; nothing was updated. On every rank.
    """
    timer = run.timer
    with timer.phase("teacher"):
        run.enter("ask")
        teacher_rows = run.teacher.ask(batch)
    trained = select_then_train(run, score(run, batch, teacher_rows, step), step)
    run.views.capture(step, batch, trained.scored.statistics, trained.selection)
    pass_seconds = timer.seconds("train")
    with timer.phase("train"):
        metrics = supervision_metrics(run.student.groups, trained, pass_seconds=pass_seconds)
        if not math.isfinite(metrics["train/loss"]):
            raise NotFiniteError(f"step {step}: expected a finite loss, got {metrics['train/loss']}")
        run.enter("update")
        updated = run.student.apply_gradients(step)
        run.teacher.follow(run.student)
    if run.last_step.adaptive_ratio is not None:
        run.last_step.adaptive_ratio = run.last_step.adaptive_ratio.after(metrics["train/loss"])
    return metrics | updated


def score(run: TrainingRun, batch: StepBatch, teacher_rows: TeacherRows | None, step: int) -> Scored:
    """Returns the batch with the statistics of every valid token, if the rule, importance weights or a view need them.

    Takes a forward pass: in one pass it is held for the training, else it has no gradient. Collective over the world.
    """
    statistics = held = None
    with run.timer.phase("score"):
        run.enter("score")
        if run.selector.required_statistics or run.config.rollout.importance_cap or run.views.is_due(step):
            held = [] if run.one_pass.suits(batch) else None
            with_support = run.views.shows_support(step)
            statistics, teacher_rows = run.teacher.score(
                run.student, batch, teacher_rows, with_support=with_support, held=held
            )
        ratios = comparable_ratios(run.config, batch, run.student.groups.dp_cp_rank, statistics)
    return Scored(batch, teacher_rows, statistics, ratios, held)


def select_then_train(run: TrainingRun, scored: Scored, step: int) -> Trained:
    """Selects among the scored rows and trains on them alone. Collective over the world.

    With held outputs it goes backward from those; else forward and backward over the batch cut to the selection.
    """
    groups = run.student.groups
    with run.timer.phase("select"):
        selection = select(run, scored, step)
        batch, selected = cut_to_selection(groups, scored, selection)
    with run.timer.phase("train"):
        run.enter("train")
        rows = selected.by_micro_batch(batch.micro_batches(groups.dp_cp_rank)) if selected is not None else []
        loss = accumulate_gradients(run.student, run.teacher, batch, rows, scored.held)
    return Trained(scored, selection, batch, loss)


def select(run: TrainingRun, scored: Scored, step: int) -> TokenSelection | None:
    """Returns the selection among this rank's scored rows on the last stage; None elsewhere.

    Every context-parallel rank selects among all rows of its replica, because a rollout's budget is one.

    Collective over the pipeline group, and on the last stage over the context- and data-parallel groups.

    Raises:
        NotFiniteError: statistics that the rule needs are not finite; on every rank.
    """
    selection: TokenSelection | None = None
    groups, cap = run.student.groups, run.config.rollout.importance_cap

    def choose() -> None:
        nonlocal selection
        selector, adaptive = run.selector, run.last_step.adaptive_ratio
        if adaptive is not None:
            selector = replace(selector, retention_ratio=adaptive.ratio)
        rows = ContextRows.of(scored.batch, groups)
        whole, index = rows.whole_statistics(scored.statistics), scored.batch.replica_index(groups.dp_rank)
        selection = rows.own_selection(selector.select(whole, index, step=step, dp_group=groups.dp_group))

    run_on(groups.last_stage_rank, choose, device=run.device, group=groups.pp_group)
    if selection is not None and cap and scored.ratios is not None:
        selection = with_importance(selection, scored.ratios, cap)
    return selection


def cut_to_selection(
    groups: ModelGroups, scored: Scored, selection: TokenSelection | None
) -> tuple[StepBatch, SelectedRows | None]:
    """Returns the batch cut after the last selected tokens, and this rank's selected rows in it.

    The batch is balanced again and equal on every rank; the rows are on the last stage, None elsewhere. A batch whose
    outputs are held stays as it is, because all of its tokens went through the model. Collective over the world.
    """
    batch, selected = scored.batch, None
    if selection is not None and scored.teacher_rows is not None:
        selected = SelectedRows.of(selection, batch.token_index(groups.dp_cp_rank), scored.teacher_rows)
    if scored.held is not None:
        return batch, selected
    last_selected = torch.full((len(batch.rollouts),), -1, dtype=torch.int64, device=batch.device)
    if selected is not None:
        last_selected.scatter_reduce_(0, selected.index.rollout_index, selected.index.position, "amax")
        dist.all_reduce(last_selected, op=dist.ReduceOp.MAX, group=groups.dp_cp_group)
    if groups.grid.pp_size > 1:
        dist.broadcast(last_selected, src=groups.last_stage_rank, group=groups.pp_group)
    trained = batch.cut_after(last_selected.tolist())
    if selected is not None and groups.dp_cp_group.size() > 1:
        selected = selected.sent_to(trained.ranks_of(selected.index), groups.dp_cp_group)
    return trained, selected


def accumulate_gradients(
    student: Student,
    teacher: Teacher[Any],
    batch: StepBatch,
    rows: Sequence[MicroBatchRows],
    held: list[Tensor] | None = None,
) -> float:
    """Accumulates the gradients of the supervised rows and returns this rank's part of the loss.

    It is 0 except on the last stage. The LM head is applied, with gradient, to those rows only.

    Args:
        rows: by this rank's micro-batches, on the last stage; empty elsewhere.
        held: the student's outputs with their graphs, which are used up; None: runs the student forward.
    """
    micro_batches = batch.micro_batches(student.groups.dp_cp_rank)
    total = torch.zeros((), device=batch.device)

    def loss_of(index: int, hidden_states: Tensor) -> Tensor:
        own, labels = rows[index], micro_batches[index].labels
        try:
            hidden = student.rows(hidden_states, own.mask)
            loss = teacher.loss(student, hidden, own.teacher_rows, labels[own.mask], own.row_weights)
            for divergence, weights in own.term_weights.items():
                on = weights > 0
                term = (hidden[on], own.teacher_rows[on], labels[own.mask][on], weights[on])
                loss = loss + teacher.loss(student, *term, divergence=divergence)
        except NotFiniteError:  # finish the schedule, as other ranks wait in it; the NaN loss tells them all
            loss = hidden_states.sum() * float("nan") + student.output_head.sum() * 0
        total.add_(loss.detach())
        return loss

    student.accumulate_gradients(micro_batches, loss_of, held=held)
    return total.item()
