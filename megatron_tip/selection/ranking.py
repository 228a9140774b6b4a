"""Rankings: the scores that a budget ranks by, from a rule and the batch's quantiles."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from megatron_tip.errors import InputError
from megatron_tip.records import TokenIndex
from megatron_tip.selection.batch import Batch
from megatron_tip.selection.counter_hash import uniform
from megatron_tip.selection.order_statistics import Quantiles
from megatron_tip.selection.rule import Input, Rule
from megatron_tip.selection.sampling import race_scores


class Stream(IntEnum):
    """The draws of one step that must not be correlated."""

    ACTIVE = 0
    COMPARED = 1


@dataclass(frozen=True)
class Draws:
    """A source of random numbers, the same for the same seed, step, stream and token."""

    seed: int
    step: int
    stream: Stream

    def of(self, index: TokenIndex) -> Tensor:
        """Returns one number per token, `[n]` float64 in (0, 1)."""
        return uniform(self.seed, self.step, index, stream=self.stream)


@dataclass(frozen=True)
class Ranking:
    """A ranking of rows. `scores`: `[n]` float32, the highest are kept; `weights`: `[n]` float64, the rule's own."""

    scores: Tensor
    weights: Tensor

    def rule_scores(self, rule: Rule) -> Tensor | None:
        """Returns the rule's score of each row, `[n]` float32; None if it has no score function."""
        return self.weights.to(torch.float32) if rule.score is not None else None


class NormalisedInputs(dict[Input, Tensor]):
    """The rules' inputs, `[n]` float64 each: computed on request, once, and shared by all rules."""

    def __init__(self, batch: Batch, quantiles: Quantiles) -> None:
        super().__init__()
        self._values, self._quantiles = batch.values, quantiles

    def __missing__(self, item: Input) -> Tensor:
        points = (self._quantiles[item.statistic, p] for p in item.normaliser.probabilities)
        self[item] = item.normaliser.function(self._values[item.statistic].to(torch.float64), *points)
        return self[item]


def rank_rows(rule: Rule, batch: Batch, inputs: NormalisedInputs, draws: Draws) -> Ranking:
    """Returns the ranking of this replica's rows; no communication.

    Raises:
        InputError: the score function does not return one score per row.
    """
    num_rows = len(batch.index)
    if rule.score is None:
        weights = torch.ones(num_rows, dtype=torch.float64, device=batch.index.position.device)
    else:
        weights = rule.score(*(inputs[item] for item in rule.inputs), **rule.constants)
    if not isinstance(weights, Tensor) or weights.shape != (num_rows,):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise InputError(f"rule {rule.name!r}: expected scores of shape ({num_rows},), one per row, got {got}")
    if rule.take == "sample":
        return Ranking(race_scores(weights, draws.of(batch.index)), weights)
    return Ranking((-weights if rule.take == "bottom" else weights).to(torch.float32), weights)
