"""The settings of a run's selection, checked before anything runs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from megatron_tip.errors import ConfigError
from megatron_tip.selection.batch import Batch
from megatron_tip.selection.budget import TieOrder
from megatron_tip.selection.counter_hash import shuffled
from megatron_tip.selection.loss_scale import LossScale
from megatron_tip.selection.normalise import NORMALISERS
from megatron_tip.selection.rule import Rule, Scope
from megatron_tip.selection.rules import PAPERS_RULES, RULES, load_rule

TieBreak = Literal["token_order", "random"]


@dataclass(frozen=True)
class SelectionSettings:
    """The settings for choosing the supervised rows of a rollout batch.

    Args:
        rule: a name in `rules.RULES`, an installed rule, or an import path (see `load_rule`).
        retention_ratio: rho in (0, 1], the share of the valid rows to keep; 1 keeps all, for every rule, and the rule
            "full" does so whatever rho is.
        scope: the unit of the budget: "batch", ceil(rho |I|) of the whole batch; "rollout", floor(rho m) of each
            rollout; "whole_rollouts", all rows of ceil(rho R) of the R rollouts. None: as the rule was published.
        normaliser: one of `normalise.NORMALISERS` for all inputs of the rule; None: the rule's own.
        tie_break: of rows with equal scores, keep the first in "token_order" (rollout, then position), or the first in
            a "random" order drawn from seed and step.
        loss_scale: divide the summed loss by the number of rows "selected", or by the number "valid"; or by the number
            valid and each row's inclusion probability ("importance", for rules that sample).
        seed: for rules that sample, and for random ties.
        minimum_per_rollout: rows to keep of a rollout if floor(rho m) is smaller; scope "rollout" only.
        parameters: constants of the rule's score and weights, in place of the published ones.
        adaptive_ratio: whether the retention ratio changes from step to step (see `adaptive_ratio`).
        steps: of the whole training, for rules that follow a schedule.
        compare: report the agreement with every other rule that the statistics allow.

    Raises:
        ConfigError: invalid arguments.
    """

    rule: str
    retention_ratio: float = 1.0
    scope: Scope | None = None
    normaliser: str | None = None
    tie_break: TieBreak = "token_order"
    loss_scale: LossScale = "selected"
    seed: int = 0
    minimum_per_rollout: int = 1
    parameters: Mapping[str, float] = field(default_factory=dict)
    adaptive_ratio: bool = False
    steps: int = 1
    compare: bool = True

    def __post_init__(self) -> None:
        _check_choice("scope", self.scope, (*get_args(Scope), None))
        _check_choice("normaliser", self.normaliser, (*NORMALISERS, None))
        _check_choice("tie_break", self.tie_break, get_args(TieBreak))
        _check_choice("loss_scale", self.loss_scale, get_args(LossScale))
        if not 0.0 < self.retention_ratio <= 1.0:
            raise ConfigError(f"retention_ratio: expected a number in (0, 1], got {self.retention_ratio}")
        if self.minimum_per_rollout < 0:
            raise ConfigError(f"minimum_per_rollout: expected 0 or more, got {self.minimum_per_rollout}")
        take = self.resolved_rule.take
        if take == "all" and self.adaptive_ratio:
            raise ConfigError(f"rule {self.rule!r} keeps every row: set adaptive_ratio = false, or choose another rule")
        if self.resolved_scope == "whole_rollouts" and take == "sample":
            raise ConfigError(f"scope 'whole_rollouts': expected a rule that ranks, got {self.rule!r}, which samples")
        if self.loss_scale == "importance" and take not in ("all", "sample"):
            sampling = [name for name, rule in RULES.items() if rule.take == "sample"]
            raise ConfigError(
                f"loss_scale 'importance' needs a rule that samples ({', '.join(sampling)}), got {self.rule!r}, which "
                "does not; use 'selected' or 'valid'"
            )

    @cached_property
    def resolved_rule(self) -> Rule:
        """The rule with the configured normaliser and constants."""
        rule = load_rule(self.rule).with_constants(self.parameters)
        return rule if self.normaliser is None else rule.with_normaliser(NORMALISERS[self.normaliser])

    @property
    def active_rule(self) -> Rule:
        """The rule in effect: without its score if all rows are kept anyway, "full" if it has no weights either."""
        rule = self.resolved_rule
        if not self.keeps_all:
            return rule
        return replace(rule, score=None, inputs=(), take="all") if rule.weights else RULES["full"]

    @property
    def resolved_scope(self) -> Scope:
        return self.scope or self.resolved_rule.scope

    @property
    def keeps_all(self) -> bool:
        """Whether the budget leaves nothing to choose in any step; weights of 0 may still drop rows."""
        return self.resolved_rule.take == "all" or (self.retention_ratio == 1.0 and not self.adaptive_ratio)

    @property
    def asked_share(self) -> float:
        """The share of the valid rows that is asked for: `retention_ratio`, or 1 if all are kept."""
        return 1.0 if self.keeps_all else self.retention_ratio

    def progress(self, step: int) -> float:
        """Returns the share of the training that is done: 0 at step 1, 1 at the last."""
        return min(1.0, max(0.0, (step - 1) / (self.steps - 1))) if self.steps > 1 else 1.0

    @property
    def required_statistics(self) -> frozenset[str]:
        """The fields of TokenStatistics that selection requires; empty if it needs no scoring pass."""
        return self.active_rule.required_statistics

    def check_available(self, available: Collection[str], source: str) -> None:
        """Raises ConfigError at the start of a run if the rule needs a statistic that it cannot compute.

        Args:
            available: fields of TokenStatistics. source: what computes them, for the message.
        """
        missing = sorted(self.required_statistics - set(available))
        if missing:
            possible = [name for name, rule in RULES.items() if rule.required_statistics <= set(available)]
            raise ConfigError(
                f"rule {self.rule!r} needs {missing}, which {source} does not provide; rules that can run on it: "
                f"{', '.join(possible)}"
            )

    def compared_rules(self, available: Collection[str]) -> list[Rule]:
        """Returns the other published rules that can be evaluated on the `available` statistics."""
        if not self.compare or self.keeps_all:
            return []
        others = (rule for rule in PAPERS_RULES.values() if rule.take != "all" and rule != self.resolved_rule)
        return [rule for rule in others if rule.required_statistics <= set(available)]

    def tie_order(self, batch: Batch, step: int) -> TieOrder:
        """Returns the order of rows with equal scores."""
        keys = batch.token_order()
        if self.tie_break == "random":
            keys = shuffled(keys, batch.key_bits, self.seed, step)
        return TieOrder(keys, batch.key_bits)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
