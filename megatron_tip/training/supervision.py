"""What is known of a step's rows before and after selection, and the rows of each micro-batch to train on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.micro_batches import token_index
from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.records import MicroBatch, TeacherRows, TokenIndex, TokenSelection
from megatron_tip.statistics import TokenStatistics


@dataclass(frozen=True)
class Scored:
    """A batch and what is known about the rows that this rank holds, which is None except on the last stage.

    `statistics`: None also if nothing needs them. `ratios`: `[n]`, ln p_student - ln p_rollout of the label; None also
    if the two are not comparable. `held`: in one pass, the student's outputs with their graphs by micro-batch, on every
    rank; empty after training. None: the training pass runs the student forward again.
    """

    batch: StepBatch
    teacher_rows: TeacherRows | None
    statistics: TokenStatistics | None
    ratios: Tensor | None
    held: list[Tensor] | None = None


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
    """The `k` rows of one micro-batch to train on. `mask`: `[s]` bool, true there. `row_weights`: `[k]` float32.

    `term_weights`: as in `TokenSelection`, `[k]` each.
    """

    mask: Tensor
    teacher_rows: TeacherRows
    row_weights: Tensor
    term_weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SelectedRows:
    """The k rows selected before the training pass. `row_weights`: `[k]` float32; `term_weights`: `[k]` each."""

    index: TokenIndex
    teacher_rows: TeacherRows
    row_weights: Tensor
    term_weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, selection: TokenSelection, index: TokenIndex, teacher_rows: TeacherRows) -> "SelectedRows":
        """Returns the selected rows among this rank's scored rows."""
        mask = selection.selection_mask
        kept = TokenIndex(index.rollout_index[mask], index.position[mask])
        terms = {name: weights[mask] for name, weights in selection.term_weights.items()}
        return cls(kept, teacher_rows[mask], selection.row_weights[mask], terms)

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
        teacher_rows, row_weights = self.teacher_rows.map(moved), moved(self.row_weights)
        terms = {name: moved(weights) for name, weights in self.term_weights.items()}
        return SelectedRows(TokenIndex(*places.unbind(dim=1)), teacher_rows, row_weights, terms)

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
        terms = {name: weights[order].split(counts) for name, weights in self.term_weights.items()}
        return [
            MicroBatchRows(rows_mask(micro_batch, part), rows, weights, {name: own[i] for name, own in terms.items()})
            for i, (micro_batch, part, rows, weights) in enumerate(
                zip(
                    micro_batches,
                    parts,
                    self.teacher_rows[order].split(counts),
                    self.row_weights[order].split(counts),
                    strict=True,
                )
            )
        ]


def rows_mask(micro_batch: MicroBatch, row_is_selected: Tensor) -> Tensor:
    """Returns the micro-batch's `loss_mask` without the rows that were not selected: `[s]` bool."""
    mask = micro_batch.loss_mask.clone()
    mask[micro_batch.loss_mask] = row_is_selected
    return mask
