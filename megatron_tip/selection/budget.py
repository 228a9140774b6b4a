"""Budgets: how many rows are kept, and exactly which ones, ties included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from megatron_tip.selection.order_statistics import FLOAT_KEY_BITS, order_statistics, ordered_keys, value_of_key
from megatron_tip.selection.replicas import Replicas


def exact_ratio(retention_ratio: float) -> Fraction:
    """Returns the ratio as the decimal that was written: 0.05 is 1/20, not the binary number next to it."""
    return Fraction(str(float(retention_ratio)))


def batch_budget(retention_ratio: float, num_rows: int) -> int:
    """Returns n = ceil(rho |I|). TA-OPD Eq. 13."""
    return math.ceil(exact_ratio(retention_ratio) * num_rows)


def rollout_budget(retention_ratio: float, num_rows: int, minimum: int) -> int:
    """Returns floor(rho m) of a rollout of m rows (TIP Eq. 8), but at least `minimum` of them, or all if m is less."""
    return max(math.floor(exact_ratio(retention_ratio) * num_rows), min(minimum, num_rows))


@dataclass(frozen=True)
class TieOrder:
    """`keys`: `[n]` int64, distinct over the batch and below 2^key_bits; of equal scores the lower key is kept."""

    keys: Tensor
    key_bits: int


@dataclass(frozen=True)
class Top:
    """The kept rows of this replica (`mask`, `[n]` bool), and facts that are equal on all replicas.

    `threshold`: the lowest score kept. `num_tied`: kept rows with just that score. `runner_up`: the best score that was
    not kept; NaN if it was not asked for or all rows are kept.
    """

    mask: Tensor
    threshold: float
    num_tied: int
    runner_up: float = math.nan


def top_of_batch(
    scores: Sequence[Tensor],
    num_kept: int,
    num_rows: int,
    ties: TieOrder,
    replicas: Replicas,
    *,
    with_runner_up: bool = False,
) -> list[Top]:
    """Returns, for each `[n]` float32 score vector, the `num_kept` highest of the `num_rows` rows of all replicas.

    Collectives: 3 all-reduces for the thresholds of all vectors; where ties straddle a threshold,
    ceil(key_bits / 11) more for all those vectors together.
    """
    assert 1 <= num_kept <= num_rows, "a budget lies between one row and all rows"
    keys = [ordered_keys(values) for values in scores]
    first = num_rows - num_kept
    ranks = [first, first - 1] if with_runner_up and first else [first]
    found = order_statistics(keys, [ranks] * len(keys), FLOAT_KEY_BITS, replicas)
    # in ascending order the rows from rank `first` on are kept: all above the threshold and `num_tied` that equal it
    num_tied = [at.num_below + at.num_equal - first for at, *_ in found]
    tied = [values == at.key for values, (at, *_) in zip(keys, found, strict=True)]
    straddling = [place for place, (at, *_) in enumerate(found) if num_tied[place] < at.num_equal]
    last_kept = order_statistics(
        [ties.keys[tied[place]] for place in straddling],
        [[num_tied[place] - 1] for place in straddling],
        ties.key_bits,
        replicas,
    )
    for place, (last,) in zip(straddling, last_kept, strict=True):
        tied[place] = tied[place] & (ties.keys <= last.key)
    tops = []
    for place, (at, *below) in enumerate(found):
        runner_up = value_of_key(below[0].key) if below else math.nan
        tops.append(Top((keys[place] > at.key) | tied[place], value_of_key(at.key), num_tied[place], runner_up))
    return tops


def rank_within_rollout(scores: Tensor, rollout_index: Tensor, ties: TieOrder) -> Tensor:
    """Returns `[n]` int64: 0 for the best-scored row of its rollout, 1 for the next, equal scores in tie order."""
    order = torch.argsort(ties.keys)
    order = order[torch.argsort(ordered_keys(scores)[order], descending=True, stable=True)]
    order = order[torch.argsort(rollout_index[order], stable=True)]
    _, counts = torch.unique_consecutive(rollout_index[order], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    place = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, place - starts)
