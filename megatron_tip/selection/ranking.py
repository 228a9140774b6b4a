"""From a rule and the batch's quantiles to the scores that a budget ranks by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from megatron_tip.errors import InputError
from megatron_tip.records import TokenIndex
from megatron_tip.selection.batch import Batch
from megatron_tip.selection.counter_hash import uniform
from megatron_tip.selection.order_statistics import Quantiles
from megatron_tip.selection.rules import Rule
from megatron_tip.selection.sampling import race_scores


class Stream(IntEnum):
    """Draws of one step that must not be correlated with each other."""

    ACTIVE = 0
    COMPARED = 1
    TIES = 2


@dataclass(frozen=True)
class Draws:
    """Where random numbers come from: equal for the same seed, step, stream and token."""

    seed: int
    step: int
    stream: Stream

    def of(self, index: TokenIndex) -> Tensor:
        """Returns `[n]` float64 in (0, 1)."""
        return uniform(self.seed, self.step, index, stream=self.stream)


@dataclass(frozen=True)
class Ranking:
    """`scores`: `[n]` float32, the highest are kept. `weights`: `[n]` float64, the rule's own scores."""

    scores: Tensor
    weights: Tensor


def rank_rows(rule: Rule, batch: Batch, quantiles: Quantiles, draws: Draws) -> Ranking:
    """Returns the ranking of this replica's rows; no communication.

    Raises: InputError for a score function that does not return one score a row.
    """
    num_rows = len(batch.index)
    weights = rule.score_rows(batch.values, quantiles)
    if weights is None:
        weights = torch.ones(num_rows, dtype=torch.float64, device=batch.index.position.device)
    if not isinstance(weights, Tensor) or weights.shape != (num_rows,):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise InputError(f"rule {rule.name!r}: expected scores of shape ({num_rows},), one a row, got {got}")
    if rule.take == "sample":
        return Ranking(race_scores(weights, draws.of(batch.index)), weights)
    return Ranking((-weights if rule.take == "bottom" else weights).to(torch.float32), weights)
