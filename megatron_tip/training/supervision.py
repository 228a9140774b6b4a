"""The rows of each micro-batch to train on: selected before the training pass, or during it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.micro_batches import token_index
from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.errors import NotFiniteError
from megatron_tip.parallel.together import raise_together
from megatron_tip.records import MicroBatch, TeacherRows, TokenIndex, TokenSelection
from megatron_tip.selection import Calibration, agreement, batch_totals, select_micro_batch
from megatron_tip.statistics import TokenStatistics
from megatron_tip.training.context_rows import ContextRows
from megatron_tip.training.run import TrainingRun


@dataclass(frozen=True)
class Scored:
    """A batch and what is known about the rows that this rank holds, which is None except on the last stage.

    `statistics`: None also if nothing needs them. `ratios`: `[n]`, ln p_student - ln p_rollout of the label; None also
    if the two are not comparable.
    """

    batch: StepBatch
    teacher_rows: TeacherRows | None
    statistics: TokenStatistics | None
    ratios: Tensor | None


@dataclass(frozen=True)
class Trained:
    """The results of a training pass, apart from the gradients.

    `selection`: among this rank's scored rows, on the last stage; None elsewhere. `batch`: the trained batch of all
    replicas. `loss`: this rank's part; 0 except on the last stage.
    """

    scored: Scored
    selection: TokenSelection | None
    batch: StepBatch
    loss: float


@dataclass(frozen=True)
class MicroBatchRows:
    """The `k` rows of one micro-batch to train on. `mask`: `[s]` bool, true there. `row_weights`: `[k]` float32."""

    mask: Tensor
    teacher_rows: TeacherRows
    row_weights: Tensor


Supervise = Callable[[int, MicroBatch, Tensor], MicroBatchRows]
"""A function that returns the rows of a micro-batch from its index, the micro-batch and its hidden states. The training
pass calls it on the last stage, in the order of the micro-batches.
"""


@dataclass(frozen=True)
class SelectedRows:
    """The k rows selected before the training pass. `row_weights`: `[k]` float32."""

    index: TokenIndex
    teacher_rows: TeacherRows
    row_weights: Tensor

    @classmethod
    def of(cls, selection: TokenSelection, index: TokenIndex, teacher_rows: TeacherRows) -> "SelectedRows":
        """Returns the selected rows among this rank's scored rows."""
        mask = selection.selection_mask
        kept = TokenIndex(index.rollout_index[mask], index.position[mask])
        return cls(kept, teacher_rows[mask], selection.row_weights[mask])

    def sent_to(self, destination: Tensor, dp_cp_group: dist.ProcessGroup) -> "SelectedRows":
        """Sends each row to the rank that will hold it and returns the rows that this rank receives, its own included.

        Args:
            destination: `[k]` int64, the place in `dp_cp_group` that each row goes to.

        Collectives: 1 all-to-all of counts over `dp_cp_group`, then 1 per tensor of the selected rows.
        """
        order = destination.argsort(stable=True)
        num_sent = torch.bincount(destination, minlength=dp_cp_group.size())
        num_received = torch.empty_like(num_sent)
        dist.all_to_all_single(num_received, num_sent, group=dp_cp_group)
        sent, received = num_sent.tolist(), num_received.tolist()

        def moved(values: Tensor) -> Tensor:
            arriving = values.new_empty((sum(received), *values.shape[1:]))
            dist.all_to_all_single(arriving, values[order], received, sent, group=dp_cp_group)
            return arriving

        places = moved(torch.stack([self.index.rollout_index, self.index.position], dim=1))
        teacher_rows = self.teacher_rows.map(moved)
        return SelectedRows(TokenIndex(*places.unbind(dim=1)), teacher_rows, moved(self.row_weights))

    def by_micro_batch(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatchRows]:
        """Returns the rows grouped by micro-batch; `micro_batches` must contain all of them."""
        index = token_index(micro_batches)
        num_positions = int(index.position.max()) + 1 if len(index) else 1
        keys, own_keys = index.keys(num_positions), self.index.keys(num_positions)
        is_selected = torch.isin(keys, own_keys)
        wanted = keys[is_selected]
        assert len(wanted) == len(own_keys), "selected rows are distinct rows of the loss masks"
        order = torch.empty_like(own_keys)
        order[wanted.argsort()] = own_keys.argsort()
        parts = is_selected.split([micro_batch.num_valid() for micro_batch in micro_batches])
        counts = [int(part.sum()) for part in parts]
        return [
            MicroBatchRows(rows_mask(micro_batch, part), rows, weights)
            for micro_batch, part, rows, weights in zip(
                micro_batches,
                parts,
                self.teacher_rows[order].split(counts),
                self.row_weights[order].split(counts),
                strict=True,
            )
        ]


class SelectedWhileTraining:
    """Scorer and selector of each micro-batch during its training pass, without gradient; on the last stage only."""

    def __init__(self, run: TrainingRun, batch: StepBatch, teacher_rows: TeacherRows, step: int) -> None:
        """Counts the rows of the batch. Collectives: 1 all-reduce over dp."""
        groups = run.student.groups
        self._run, self._batch, self._step = run, batch, step
        self._teacher_parts = teacher_rows.split(batch.num_rows()[groups.dp_cp_rank])
        counts = torch.tensor(batch.num_replica_rows(groups.dp_rank), dtype=torch.int64, device=run.device)
        self._totals = batch_totals(run.selector, counts, dp_group=groups.dp_group)
        self._statistics: list[TokenStatistics] = []
        self._selections: list[TokenSelection] = []

    def rows(self, index: int, micro_batch: MicroBatch, hidden_states: Tensor) -> MicroBatchRows:
        """Returns the rows of micro-batch `index` to train on; see `Supervise`. Collective over tp x cp."""
        run, teacher_rows, groups = self._run, self._teacher_parts[index], self._run.student.groups
        rows, statistics = ContextRows.of(self._batch, groups, index), None
        if run.selector.required_statistics or run.views.is_due(self._step):
            statistics = self._scored(micro_batch, hidden_states, teacher_rows)
            self._statistics.append(statistics)
            statistics = rows.whole_statistics(statistics)
        selection = select_micro_batch(
            run.selector,
            statistics,
            token_index([self._batch.micro_batch(groups.dp_rank, index)]),
            step=self._step,
            totals=self._totals,
            calibration=run.last_step.calibration,
        )
        selection = rows.own_selection(selection)
        self._selections.append(selection)
        mask = selection.selection_mask
        return MicroBatchRows(rows_mask(micro_batch, mask), teacher_rows[mask], selection.row_weights[mask])

    def _scored(self, micro_batch: MicroBatch, hidden_states: Tensor, teacher_rows: TeacherRows) -> TokenStatistics:
        """Returns the statistics of this rank's rows of a micro-batch.

        Raises:
            NotFiniteError: on all tp x cp ranks; the logits of one of its parts are not finite.
        """
        run, groups, found, failure = self._run, self._run.student.groups, None, None
        try:
            found = run.teacher.statistics(
                run.student,
                run.student.rows(hidden_states.detach(), micro_batch.loss_mask),
                teacher_rows,
                micro_batch.labels[micro_batch.loss_mask],
                with_support=run.views.shows_support(self._step),
            )
        except NotFiniteError as error:
            failure = error
        if groups.grid.cp_size > 1:
            raise_together(failure, device=run.device, group=groups.cp_group)
        if found is None:
            raise failure or AssertionError("either statistics or a failure")
        return found

    @cached_property
    def statistics(self) -> TokenStatistics | None:
        """The statistics of this rank's rows, once the pass is over; None if nothing needs them."""
        return TokenStatistics.concatenate(self._statistics) if self._statistics else None

    def finish(self, index: TokenIndex) -> tuple[TokenSelection, Calibration | None]:
        """Returns the selection among this rank's rows with metrics, and the calibration for the next step.

        Call it after the pass. With thresholds "last_step" it also makes the exact selection, which gives the next
        step's thresholds and shows how far off this step's selection was. Collectives are those of `Selector`.

        Args:
            index: of this rank's rows.
        """
        selector, group = self._run.selector, self._run.student.groups.dp_cp_group
        statistics = self.statistics
        mask = torch.cat([selection.selection_mask for selection in self._selections])
        weights = torch.cat([selection.row_weights for selection in self._selections])
        metrics, calibration = selector.describe(statistics, index, mask, dp_group=group), None
        if selector.thresholds == "last_step":
            alone = replace(selector, compare=False)
            exact, calibration = alone.select_and_calibrate(statistics, index, step=self._step, dp_group=group)
            metrics |= {
                "selection/exact_agreement": agreement(mask, exact.selection_mask, dp_group=group),
                "selection/exact_num_selected": float(exact.num_selected),
            }
        num_selected = int(metrics["selection/num_selected"])
        # A micro-batch without rows has no scores; a part of one without rows has none to add.
        scores = [one.scores for one in self._selections if one.scores is not None or len(one.selection_mask)]
        found = torch.cat([part for part in scores if part is not None]) if scores and None not in scores else None
        return TokenSelection(mask, weights, self._totals.num_valid, num_selected, metrics, found), calibration


def rows_mask(micro_batch: MicroBatch, row_is_selected: Tensor) -> Tensor:
    """Returns the micro-batch's `loss_mask` without the rows that were not selected: `[s]` bool."""
    mask = micro_batch.loss_mask.clone()
    mask[micro_batch.loss_mask] = row_is_selected
    return mask
