"""One training step as named stages: rollout, teacher, score, select, train, sync."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import TrainingError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.records import MicroBatch, Prompt, Rollout, TokenSelection, TokenStatistics
from megatron_tip.rollout.broadcast import broadcast_rollouts
from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.rollout.step_batch import StepBatch
from megatron_tip.rollout.storage import write_rollouts
from megatron_tip.selection import Calibration
from megatron_tip.training.metrics import rollout_metrics, supervision_metrics
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.scoring import score_tokens
from megatron_tip.training.supervision import SelectedRows, SelectedWhileTraining, Supervise
from megatron_tip.training.weight_sync import sync_weights
from megatron_tip.vocab_parallel import divergence_loss


@dataclass(frozen=True)
class Trained:
    """What a training pass leaves besides gradients.

    `batch`: as it went through the pass, over all replicas. `loss`: this replica's part, 0 off the last stage.
    `statistics`, `selection`: of this replica's scored rows, on the last stage; None elsewhere, `statistics` also where
    the rule asks for none.
    """

    batch: StepBatch
    loss: float
    statistics: TokenStatistics | None
    selection: TokenSelection | None


def train_step(run: TrainingRun, step: int) -> dict[str, float]:
    """Runs step `step` (from 1) and returns its metrics, equal on every rank. Collective over the world.

    Raises:
        TrainingError: rollouts of other weights than the last, a loss or gradient that is not finite; nothing was
            updated.
    """
    timer = run.timer
    with timer.phase("rollout"):
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
        sync_weights(run.student, run.architecture, run.engine, weight_version=step)
        return {**metrics, "train/skipped_no_valid_token": 1.0}
    with timer.phase("teacher"):
        teacher_rows = run.teacher.hidden_rows(batch)
    one_pass = run.selector.selects_in_one_pass(run.last_step.calibration)
    trained = (select_while_training if one_pass else select_then_train)(run, batch, teacher_rows, step)
    pass_seconds = timer.seconds("train")
    with timer.phase("train"):
        metrics |= supervision_metrics(
            run.student.groups,
            scored=batch,
            trained=trained.batch,
            statistics=trained.statistics,
            selection=trained.selection,
            loss=trained.loss,
            pass_seconds=pass_seconds,
            device=run.device,
        )
        if not math.isfinite(metrics["train/loss"]):
            raise TrainingError(
                f"step {step}: expected a finite loss, got {metrics['train/loss']}; nothing was updated"
            )
        metrics |= run.student.apply_gradients(step)
    with timer.phase("sync"):
        sync_weights(run.student, run.architecture, run.engine, weight_version=step)
    return metrics


def generate_rollouts(run: TrainingRun, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
    """The engine's responses, on every rank; empty responses are left in and have no valid token."""

    def generate() -> list[Rollout]:
        assert run.engine is not None, "the engine lives in the first process"
        rollouts = run.engine.generate(prompts, sampling)
        if run.config.output.save_rollouts:
            write_rollouts(RunFolder(run.config.run.folder).rollouts, sampling.batch_name, rollouts, prompts)
        return rollouts

    return broadcast_rollouts(generate, device=run.device)


def select_then_train(run: TrainingRun, batch: StepBatch, teacher_rows: Tensor | None, step: int) -> Trained:
    """Scores every token in a pass of its own, selects, and trains on what the selection leaves of the batch."""
    with run.timer.phase("score"):
        statistics = score_tokens(run, batch, teacher_rows) if run.selector.required_statistics else None
    with run.timer.phase("select"):
        trained, selected, selection = select_tokens(run, batch, statistics, teacher_rows, step)
    with run.timer.phase("train"):
        micro_batches = trained.micro_batches(run.student.groups.dp_rank)
        rows = selected.by_micro_batch(micro_batches) if selected is not None else []
        loss = accumulate_gradients(run, micro_batches, lambda index, *_: rows[index])
    return Trained(trained, loss, statistics, selection)


def select_while_training(run: TrainingRun, batch: StepBatch, teacher_rows: Tensor | None, step: int) -> Trained:
    """Scores and selects within each micro-batch as it trains: one forward pass, over the whole sequences."""
    groups = run.student.groups
    statistics, selection, calibration = None, None, None
    with run.timer.phase("train"):
        chooser = SelectedWhileTraining(run, batch, teacher_rows, step) if teacher_rows is not None else None
        micro_batches = batch.micro_batches(groups.dp_rank)
        loss = accumulate_gradients(run, micro_batches, chooser.rows if chooser is not None else None)
    with run.timer.phase("select"):
        if chooser is not None:
            statistics, selection, calibration = chooser.finish(batch.token_index(groups.dp_rank))
        remember_calibration(run, calibration)
    return Trained(batch, loss, statistics, selection)


def select_tokens(
    run: TrainingRun, batch: StepBatch, statistics: TokenStatistics | None, teacher_rows: Tensor | None, step: int
) -> tuple[StepBatch, SelectedRows | None, TokenSelection | None]:
    """Selects on the last stage and tells the other stages; cuts the batch behind the selected tokens and balances it.

    Returns the batch to train on, equal on every rank, and on the last stage the rows of this replica in it, and the
    selection among the rows that it scored.
    """
    groups = run.student.groups
    last_selected = torch.full((len(batch.rollouts),), -1, dtype=torch.int64, device=run.device)
    selected, selection, calibration = None, None, None
    if teacher_rows is not None:
        index = batch.token_index(groups.dp_rank)
        selection, calibration = run.selector.select_and_calibrate(
            statistics, index, step=step, dp_group=groups.dp_group
        )
        selected = SelectedRows.of(selection, index, teacher_rows)
        last_selected.scatter_reduce_(0, selected.index.rollout_index, selected.index.position, "amax")
        dist.all_reduce(last_selected, op=dist.ReduceOp.MAX, group=groups.dp_group)
    if groups.grid.pp_size > 1:
        dist.broadcast(last_selected, src=groups.last_stage_rank, group=groups.pp_group)
    remember_calibration(run, calibration)
    trained = batch.cut_behind(last_selected.tolist())
    if selected is not None and groups.grid.dp_size > 1:
        selected = selected.sent_to(trained.replica_of()[selected.index.rollout_index], groups.dp_group)
    return trained, selected, selection


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
    config = run.config
    total = torch.zeros((), device=run.device)

    def loss_of(index: int, hidden_states: Tensor) -> Tensor:
        assert supervise is not None, "the loss is taken on the last stage"
        micro_batch = micro_batches[index]
        rows = supervise(index, micro_batch, hidden_states)
        loss = divergence_loss(
            run.student.rows(hidden_states, rows.mask),
            run.student.output_head,
            rows.teacher_hidden,
            run.teacher.head,
            divergence=config.loss.divergence,
            row_weights=rows.row_weights,
            labels=micro_batch.labels[rows.mask],
            vocab_size=run.vocab_size,
            temperature=config.loss.temperature,
            jsd_beta=config.loss.jsd_beta,
            tp_group=run.student.groups.tp_group,
            chunk_rows=config.loss.chunk_rows or None,
        )
        total.add_(loss.detach())
        return loss

    run.student.accumulate_gradients(micro_batches, loss_of)
    return total.item()
