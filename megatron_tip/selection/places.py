"""The places of one replica's rows in their rollouts and turns, and sums over those."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_tip.records import TokenIndex


@dataclass(frozen=True)
class Groups:
    """Rows in groups. `group`, `rank`: `[n]` int64, each row's group and its 0-based place there. `sizes`: `[groups]`.

    Sums of a group are float64 and taken in the order of its rows alone, so that they do not depend on the layout.
    """

    group: Tensor
    rank: Tensor
    sizes: Tensor

    def running_sum(self, values: Tensor) -> Tensor:
        """Returns the sum of `values` over the group's rows up to each row, itself included; `[n]` float64."""
        return self._running(values)[self.group, self.rank]

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of `values` over each group, `[groups]` float64."""
        return self._running(values)[torch.arange(len(self.sizes), device=values.device), self.sizes - 1]

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean of `values` over each group, `[groups]` float64."""
        return self.total(values) / self.sizes

    def _running(self, values: Tensor) -> Tensor:
        longest = int(self.sizes.max()) if len(self.sizes) else 0
        table = torch.zeros(len(self.sizes), longest, dtype=torch.float64, device=values.device)
        table[self.group, self.rank] = values.to(torch.float64)
        return table.cumsum(1)


@dataclass(frozen=True)
class Places:
    """The places of one replica's rows; all rows of a rollout lie on one replica."""

    index: TokenIndex

    @cached_property
    def rollouts(self) -> Groups:
        """The rows by rollout, ordered by position."""
        starts = self.index.rollout_index[self._order].diff(prepend=self.index.rollout_index.new_full((1,), -1)) != 0
        return self._grouped(starts)

    @cached_property
    def turns(self) -> Groups:
        """The rows by turn: a run of positions that no text of an environment interrupts, within a rollout."""
        position = self.index.position[self._order]
        starts = position.diff(prepend=position.new_full((1,), -2)) != 1
        starts |= self.index.rollout_index[self._order].diff(prepend=position.new_full((1,), -1)) != 0
        return self._grouped(starts)

    @cached_property
    def first_turn(self) -> Tensor:
        """Each row's rollout's first turn, as a group of `turns`; `[n]` int64."""
        rollouts = self.rollouts
        first = torch.empty_like(rollouts.sizes)
        is_first = rollouts.rank == 0
        first[rollouts.group[is_first]] = self.turns.group[is_first]
        return first[rollouts.group]

    @cached_property
    def _order(self) -> Tensor:
        """The rows by rollout, then by position."""
        num_positions = int(self.index.position.max()) + 1 if len(self.index) else 1
        return self.index.keys(num_positions).argsort()

    def _grouped(self, starts: Tensor) -> Groups:
        """Returns the groups of the ordered rows that begin where `starts` holds; `[n]` bool in `_order`."""
        sorted_group = starts.to(torch.int64).cumsum(0) - 1
        sizes = torch.bincount(sorted_group)
        place = torch.arange(len(starts), device=starts.device)
        group, rank = torch.empty_like(place), torch.empty_like(place)
        group[self._order] = sorted_group
        rank[self._order] = place - (sizes.cumsum(0) - sizes)[sorted_group]
        return Groups(group, rank, sizes)
