"""The selection rules by name: each row names one published combination of score, normalisers and budget scope."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

from megatron_tip.errors import ConfigError
from megatron_tip.records import TokenStatistics
from megatron_tip.selection import scores
from megatron_tip.selection.normalise import CLIPPED_MIN_MAX, MIN_MAX, RAW, ROBUST, Normaliser

Take = Literal["all", "top", "bottom", "sample"]
Scope = Literal["batch", "rollout", "micro_batch"]

STATISTICS = frozenset(field.name for field in fields(TokenStatistics) if "support_ids" not in field.name) - {
    "student_support_logprobs",
    "teacher_support_logprobs",
}


@dataclass(frozen=True)
class Input:
    """One argument of a score function: a field of TokenStatistics and how it is normalised."""

    statistic: str
    normaliser: Normaliser = ROBUST


@dataclass(frozen=True)
class Rule:
    """A selection rule.

    `score(*inputs)` gives `[n]` scores. `take`: "all" rows; the "top" or "bottom" of the scores; or a "sample" without
    replacement with probability proportional to the score (no score: uniform). `scope`: the budget's scope in the
    paper, used unless the selector is told another.
    """

    name: str
    score: Callable[..., Tensor] | None
    inputs: tuple[Input, ...] = ()
    take: Take = "top"
    scope: Scope = "batch"

    @property
    def required_statistics(self) -> frozenset[str]:
        return frozenset(item.statistic for item in self.inputs)


_ENTROPY = Input("student_entropy")
_DIVERGENCE = Input("support_divergence")
_COMPATIBILITY = Input("compatibility")
_TIP_ENTROPY = Input("student_entropy", CLIPPED_MIN_MAX)
_TIP_DIVERGENCE = Input("reverse_kl", MIN_MAX)

_ROWS = (
    Rule("full", None, take="all"),
    Rule("random", None, take="sample"),
    Rule("tip_entropy_sampling", scores.single, (Input("student_entropy", RAW),), take="sample", scope="rollout"),
    Rule("tip_entropy", scores.single, (_TIP_ENTROPY,), scope="rollout"),
    Rule("tip_divergence", scores.single, (_TIP_DIVERGENCE,), scope="rollout"),
    Rule("tip_soft_or", scores.soft_or, (_TIP_ENTROPY, _TIP_DIVERGENCE), scope="rollout"),
    Rule("ta_opd_entropy", scores.single, (_ENTROPY,)),
    Rule("ta_opd_divergence", scores.single, (_DIVERGENCE,)),
    Rule("ta_opd_compatibility", scores.single, (_COMPATIBILITY,)),
    Rule("ta_opd_soft_or", scores.soft_or, (_ENTROPY, _DIVERGENCE)),
    Rule("ta_opd_teachability", scores.teachability, (_DIVERGENCE, _COMPATIBILITY)),
    Rule("ta_opd_entropy_teachability", scores.entropy_teachability, (_ENTROPY, _DIVERGENCE, _COMPATIBILITY)),
)
RULES = {rule.name: rule for rule in _ROWS}


def load_rule(name: str) -> Rule:
    """Returns the rule of that name, or the one at an import path "package.module:attribute".

    The attribute is a `Rule`, or a score function whose parameters are named after fields of TokenStatistics; each is
    then given Norm_B of that field. Raises ConfigError for a name that is neither.
    """
    if name in RULES:
        return RULES[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        nearest = difflib.get_close_matches(name, RULES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"rule: expected one of {', '.join(RULES)} or an import path 'package.module:function', got {name!r}; "
            f"the nearest name is {nearest!r}"
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rule: cannot import {name!r} ({error}); check the path and PYTHONPATH") from error
    rule = found if isinstance(found, Rule) else _rule_of_function(name, found)
    unknown = rule.required_statistics - STATISTICS
    if unknown:
        raise ConfigError(
            f"rule {name!r}: asks for {sorted(unknown)}, which are no per-token statistics; "
            f"expected names among {sorted(STATISTICS)}"
        )
    return rule


def _rule_of_function(name: str, function: object) -> Rule:
    """Returns a rule that gives `function` Norm_B of the statistics that its parameters name."""
    if not callable(function):
        raise ConfigError(f"rule {name!r}: expected a Rule or a score function, got {type(function).__name__}")
    return Rule(name, function, tuple(Input(parameter) for parameter in inspect.signature(function).parameters))
