"""The parts of a preset: which rows it keeps, how much each weighs, and which divergences its loss adds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from megatron_tip.errors import ConfigError
from megatron_tip.selection.normalise import ABOVE_MEDIAN, ROBUST, Normaliser

Take = Literal["all", "top", "bottom", "sample"]
Scope = Literal["batch", "rollout", "whole_rollouts"]
Rounding = Literal["down", "up"]


@dataclass(frozen=True)
class Input:
    """One argument of a score or weight function: a statistic and how it is normalised."""

    statistic: str
    normaliser: Normaliser = ROBUST


@dataclass(frozen=True)
class Weight:
    """A weight of each row. To add one, write a function in `weights.py` and name it in a row of the table.

    `function(places, *inputs, **constants)` returns `[n]` float64, at least 0; a row that weighs 0 is not supervised.
    `constants`: the published numbers, which `selection.parameters` may replace; NaN: there is none, it must be set.
    `follows_training`: the function also takes `progress`, 0 at the first step of the training and 1 at the last.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Input, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)
    follows_training: bool = False


@dataclass(frozen=True)
class Term:
    """A further divergence in the loss of a row, with its own weight. The rule's main weight does not multiply it."""

    divergence: str
    weight: Weight


@dataclass(frozen=True)
class Rule:
    """A preset: selection, weights and loss terms. To add one, write its functions and a row of the table.

    `score(*inputs, **constants)` returns `[n]` scores and must not modify its inputs. `take`: "all" rows; the "top" or
    "bottom" of the scores; or a "sample" without replacement with probability proportional to the score (no score:
    uniform). `scope`: the budget's scope in the paper, which the selector can override; `rounding`: of a rollout's
    budget. `weight`: multiplies each kept row's loss; None: 1. `terms`: added to it. `divergence`: the loss that it was
    published with, where it stands on no other; "": any.
    """

    name: str
    score: Callable[..., Tensor] | None
    inputs: tuple[Input, ...] = ()
    take: Take = "top"
    scope: Scope = "batch"
    rounding: Rounding = "down"
    weight: Weight | None = None
    terms: tuple[Term, ...] = ()
    divergence: str = ""
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The main weight, if there is one, and those of the terms."""
        return (*([self.weight] if self.weight else []), *(term.weight for term in self.terms))

    @property
    def follows_training(self) -> bool:
        """Whether a weight depends on how much of the training is done."""
        return any(weight.follows_training for weight in self.weights)

    @property
    def scored_statistics(self) -> frozenset[str]:
        """The statistics that the ranking of rows reads."""
        return frozenset(item.statistic for item in self.inputs)

    @property
    def required_statistics(self) -> frozenset[str]:
        return frozenset(item.statistic for item in self._all_inputs)

    @property
    def required_quantiles(self) -> frozenset[tuple[str, float]]:
        """The required quantiles, as pairs of a statistic and a probability."""
        return frozenset((item.statistic, p) for item in self._all_inputs for p in item.normaliser.probabilities)

    @property
    def _all_inputs(self) -> tuple[Input, ...]:
        return (*self.inputs, *(item for weight in self.weights for item in weight.inputs))

    def with_normaliser(self, normaliser: Normaliser) -> "Rule":
        """Returns the rule with this normaliser for every input of its score, except for the cuts of quadrants."""
        inputs = (i if i.normaliser is ABOVE_MEDIAN else replace(i, normaliser=normaliser) for i in self.inputs)
        return replace(self, inputs=tuple(inputs))

    def with_constants(self, values: Mapping[str, float]) -> "Rule":
        """Returns the rule with these values for the constants of its score and its weights.

        Raises:
            ConfigError: the rule has no such constant, or one without a published value is missing.
        """
        owners = (self, *self.weights)
        known = {name: value for owner in owners for name, value in owner.constants.items()}
        if unknown := sorted(values.keys() - known.keys()):
            raise ConfigError(
                f"parameters: expected constants of rule {self.name!r} ({', '.join(known) or 'it has none'}), got "
                f"{', '.join(unknown)}"
            )
        if missing := sorted(name for name, value in known.items() if math.isnan(values.get(name, value))):
            raise ConfigError(
                f"parameters: rule {self.name!r} needs {', '.join(missing)}, for which no value is published; set "
                f"selection.parameters = {{ {missing[0]} = ... }}"
            )

        def set_in(constants: Mapping[str, float]) -> dict[str, float]:
            return {name: values.get(name, old) for name, old in constants.items()}

        def filled(weight: Weight) -> Weight:
            return replace(weight, constants=set_in(weight.constants))

        terms = tuple(replace(term, weight=filled(term.weight)) for term in self.terms)
        weight = self.weight and filled(self.weight)
        return replace(self, weight=weight, terms=terms, constants=set_in(self.constants))
