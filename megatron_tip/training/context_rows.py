"""The rows of a student replica, which its context-parallel ranks hold in parts.

Statistics, teacher's rows and the loss are computed where a row is; a selection sees whole sequences.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.context_parts import gathered_rows
from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import TokenSelection
from megatron_tip.statistics import TokenStatistics


@dataclass(frozen=True)
class ContextRows:
    """The rows of a replica.

    `owners`: `[n]` int64, the context-parallel rank that holds each row. Without context parallelism it is empty, and
    every method returns what it is given. Methods named `whole` are collective over `cp_group`.
    """

    owners: Tensor
    cp_group: dist.ProcessGroup

    @classmethod
    def of(cls, batch: StepBatch, groups: ModelGroups) -> "ContextRows":
        """Returns the rows of this rank's replica."""
        in_parts = groups.grid.cp_size > 1
        owners = batch.row_owners(groups.dp_rank) if in_parts else torch.empty(0, dtype=torch.int64)
        return cls(owners, groups.cp_group)

    def whole(self, values: Tensor) -> Tensor:
        """Returns the values of all rows, `[n, ...]`, from those of this rank's own. 1 all-gather."""
        return gathered_rows(values, self.owners, self.cp_group)

    def whole_statistics(self, statistics: TokenStatistics | None) -> TokenStatistics | None:
        """Returns the statistics of all rows; without those that a rank lacks, because its logits are not finite.

        Collectives: 1 all-reduce of a few integers, 1 all-gather, and 1 more for each tensor of the models' supports.
        """
        if statistics is None or self.cp_group.size() == 1:
            return statistics
        values = {one.name: getattr(statistics, one.name) for one in fields(statistics)}
        known = torch.tensor([value is not None for value in values.values()], dtype=torch.int32)
        known = known.to(self.owners.device)
        dist.all_reduce(known, op=dist.ReduceOp.MIN, group=self.cp_group)
        found = {name: values[name] for name, everywhere in zip(values, known.tolist(), strict=True) if everywhere}
        names = [name for name, value in found.items() if value.ndim == 1]
        columns = self.whole(torch.stack([found[name] for name in names], dim=1)).unbind(dim=1)
        supports = {name: self.whole(value) for name, value in found.items() if value.ndim > 1}
        whole = dict.fromkeys(values) | dict(zip(names, columns, strict=True)) | supports
        return TokenStatistics(**whole)  # type: ignore[arg-type]

    def whole_selection(self, selection: TokenSelection) -> TokenSelection:
        """Returns the selection among all rows, from that among this rank's own.

        2 all-gathers, 1 more with scores, and 1 for each term of the loss.
        """
        if self.cp_group.size() == 1:
            return selection
        return replace(
            selection,
            selection_mask=self.whole(selection.selection_mask.to(torch.uint8)).bool(),
            row_weights=self.whole(selection.row_weights),
            scores=None if selection.scores is None else self.whole(selection.scores),
            term_weights={name: self.whole(weights) for name, weights in selection.term_weights.items()},
        )

    def own_selection(self, selection: TokenSelection) -> TokenSelection:
        """Returns the part of a selection among all rows that concerns this rank's own."""
        if self.cp_group.size() == 1:
            return selection
        own = self.owners == self.cp_group.rank()
        return replace(
            selection,
            selection_mask=selection.selection_mask[own],
            row_weights=selection.row_weights[own],
            scores=None if selection.scores is None else selection.scores[own],
            term_weights={name: weights[own] for name, weights in selection.term_weights.items()},
        )
