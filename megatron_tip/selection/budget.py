"""Budgets: how many rows are kept, and exactly which ones, ties included."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from megatron_tip.records import TokenIndex
from megatron_tip.selection.order_statistics import FLOAT_KEY_BITS, order_statistics, ordered_keys, value_of_key
from megatron_tip.selection.places import Groups
from megatron_tip.selection.replicas import Replicas
from megatron_tip.selection.rule import Rounding


def exact_ratio(retention_ratio: float) -> Fraction:
    """Returns the ratio as the decimal that was written: 0.05 is 1/20, not the nearest binary number."""
    return Fraction(str(float(retention_ratio)))


def batch_budget(retention_ratio: float, num_rows: int) -> int:
    """Returns n = ceil(rho |I|). TA-OPD Eq. 13."""
    return math.ceil(exact_ratio(retention_ratio) * num_rows)


def rollout_budget(retention_ratio: float, num_rows: int, minimum: int, rounding: Rounding = "down") -> int:
    """Returns floor(rho m) for a rollout of m rows (TIP Eq. 8), but at least `minimum`, or m if that is less.

    `rounding` "up": ceil(rho m) (SE-KD).
    """
    share = exact_ratio(retention_ratio) * num_rows
    return max(math.ceil(share) if rounding == "up" else math.floor(share), min(minimum, num_rows))


@dataclass(frozen=True)
class TieOrder:
    """An order of tied rows. `keys`: `[n]` int64, distinct over the batch, below 2^key_bits; the lower key is kept."""

    keys: Tensor
    key_bits: int


@dataclass(frozen=True)
class Threshold:
    """The lowest kept score, how many kept rows have exactly that score, and how many of all rows do."""

    score: float
    num_tied: int
    num_equal: int


@dataclass(frozen=True)
class Kept:
    """The rows of this replica that a budget keeps: `mask`, `[n]` bool.

    `runner_up`: for each row, the best score that its budget did not keep, 0 if it kept all; `[n]` or one number.
    `threshold`: over all replicas, the same on all; None if each rollout has its own.
    """

    mask: Tensor
    runner_up: Tensor | float = 0.0
    threshold: Threshold | None = None


class Budget(Protocol):
    """A budget of the best rows of each score vector.

    `num_selected`: of the whole batch, the same on all replicas; None if it depends on the scores.
    """

    @property
    def num_selected(self) -> int | None: ...

    def keep(self, scores: Sequence[Tensor], ties: TieOrder, *, with_runner_up: bool) -> list[Kept]:
        """Returns the kept rows for each `[n]` float32 score vector."""
        ...

    def uniform_inclusion(self) -> Tensor | float:
        """Returns each row's probability to be kept under identically distributed scores; `[n]` or one number."""
        ...


@dataclass(frozen=True)
class NoBudget:
    """The budget that keeps all rows."""

    num_selected: int

    def keep(self, scores: Sequence[Tensor], ties: TieOrder, *, with_runner_up: bool) -> list[Kept]:
        return [Kept(torch.ones_like(row_scores, dtype=torch.bool)) for row_scores in scores]

    def uniform_inclusion(self) -> float:
        return 1.0


@dataclass(frozen=True)
class BatchBudget:
    """A budget of `num_selected` of the `num_rows` rows of all `replicas`."""

    num_selected: int
    num_rows: int
    replicas: Replicas

    def keep(self, scores: Sequence[Tensor], ties: TieOrder, *, with_runner_up: bool) -> list[Kept]:
        """Returns the kept rows, as `Budget.keep`; `runner_up` is 0 unless requested.

        Collectives: 3 all-reduces for the thresholds of all vectors; if ties straddle a threshold, ceil(key_bits / 11)
        more for all such vectors together.
        """
        assert 1 <= self.num_selected <= self.num_rows, "a budget lies between one row and all rows"
        # in ascending order, the rows from rank `first` on are kept: all above the threshold, and the last tied ones
        first = self.num_rows - self.num_selected
        ranks = [first, first - 1] if with_runner_up and first else [first]
        keys = [ordered_keys(values) for values in scores]
        found = order_statistics(keys, [ranks] * len(keys), FLOAT_KEY_BITS, self.replicas)
        thresholds = [statistics[0] for statistics in found]
        num_tied = [at.num_below + at.num_equal - first for at in thresholds]
        tied = [row_keys == at.key for row_keys, at in zip(keys, thresholds, strict=True)]
        self._cut_ties(tied, num_tied, [at.num_equal for at in thresholds], ties)
        return [
            Kept(
                mask=(keys[place] > at.key) | tied[place],
                runner_up=value_of_key(found[place][1].key) if len(ranks) > 1 else 0.0,
                threshold=Threshold(value_of_key(at.key), num_tied[place], at.num_equal),
            )
            for place, at in enumerate(thresholds)
        ]

    def _cut_ties(self, tied: list[Tensor], num_kept: list[int], num_equal: list[int], ties: TieOrder) -> None:
        """Keeps, in place, the first `num_kept` rows in tie order of each of the `tied` masks."""
        straddling = [place for place in range(len(tied)) if num_kept[place] < num_equal[place]]
        keys = [ties.keys[tied[place]] for place in straddling]
        last_ranks = [[num_kept[place] - 1] for place in straddling]
        last_kept = order_statistics(keys, last_ranks, ties.key_bits, self.replicas)
        for place, (last,) in zip(straddling, last_kept, strict=True):
            tied[place] &= ties.keys <= last.key

    def uniform_inclusion(self) -> float:
        return self.num_selected / self.num_rows


@dataclass(frozen=True)
class RolloutBudget:
    """A budget of the best rows of each rollout; a rollout lies on one replica, so nothing is communicated.

    `place`: `[n]`, each row's rollout among the replica's rollouts. `lengths`, `budgets`: `[rollouts]` int64.
    """

    num_selected: int
    place: Tensor
    lengths: Tensor
    budgets: Tensor

    @staticmethod
    def of(index: TokenIndex, retention_ratio: float, minimum: int, rounding: Rounding = "down") -> "RolloutBudget":
        """Returns the budgets of this replica's rollouts; `num_selected` counts only this replica."""
        _, place, lengths = torch.unique(index.rollout_index, return_inverse=True, return_counts=True)
        budgets = [rollout_budget(retention_ratio, length, minimum, rounding) for length in lengths.tolist()]
        return RolloutBudget(
            sum(budgets), place, lengths, torch.tensor(budgets, dtype=torch.int64, device=place.device)
        )

    def keep(self, scores: Sequence[Tensor], ties: TieOrder, *, with_runner_up: bool) -> list[Kept]:
        in_tie_order = torch.argsort(ties.keys)
        return [self._keep(row_scores, in_tie_order, with_runner_up) for row_scores in scores]

    def _keep(self, scores: Tensor, in_tie_order: Tensor, with_runner_up: bool) -> Kept:
        rank, budget = self._rank_within_rollout(scores, in_tie_order), self.budgets[self.place]
        runner_up = torch.zeros_like(self.budgets, dtype=torch.float32)
        if with_runner_up:
            next_best = rank == budget
            runner_up[self.place[next_best]] = scores[next_best]
        return Kept(rank < budget, runner_up[self.place])

    def _rank_within_rollout(self, scores: Tensor, in_tie_order: Tensor) -> Tensor:
        """Returns `[n]` int64: 0 for the best row of its rollout, 1 for the next; equal scores in tie order."""
        best_first = (self.place << FLOAT_KEY_BITS) - ordered_keys(scores)
        order = in_tie_order[torch.argsort(best_first[in_tie_order], stable=True)]
        starts = torch.repeat_interleave(self.lengths.cumsum(0) - self.lengths, self.lengths)
        rank = torch.arange(len(order), device=order.device) - starts
        return torch.empty_like(order).scatter_(0, order, rank)

    def uniform_inclusion(self) -> Tensor:
        return (self.budgets / self.lengths)[self.place]


@dataclass(frozen=True)
class WholeRolloutsBudget:
    """A budget of the whole rollouts with the highest mean score, `among_rollouts`. FiRe (arXiv:2606.02684).

    `rollouts`: this replica's rows by rollout.
    """

    among_rollouts: BatchBudget
    rollouts: Groups
    num_selected: None = None

    def keep(self, scores: Sequence[Tensor], ties: TieOrder, *, with_runner_up: bool) -> list[Kept]:
        """Returns the kept rows, as `BatchBudget.keep`, with a threshold of rollouts. Of ties the first row decides."""
        group = self.rollouts.group
        means = [self.rollouts.mean(row_scores).to(torch.float32) for row_scores in scores]
        first_keys = torch.full_like(self.rollouts.sizes, 2**ties.key_bits - 1)
        first_keys.scatter_reduce_(0, group, ties.keys, "amin")
        kept = self.among_rollouts.keep(means, TieOrder(first_keys, ties.key_bits), with_runner_up=with_runner_up)
        return [Kept(one.mask[group], one.runner_up, one.threshold) for one in kept]

    def uniform_inclusion(self) -> float:
        return self.among_rollouts.uniform_inclusion()
