"""The selector: from the statistics of a rollout batch to the rows that are supervised, equal on every layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import ConfigError, InputError, TrainingError
from megatron_tip.records import TokenIndex, TokenSelection, TokenStatistics
from megatron_tip.selection.budget import TieOrder, batch_budget, rank_within_rollout, rollout_budget, top_of_batch
from megatron_tip.selection.counter_hash import uniform
from megatron_tip.selection.order_statistics import quantiles
from megatron_tip.selection.replicas import Replicas
from megatron_tip.selection.rules import STATISTICS, Rule, Scope, load_rule
from megatron_tip.selection.sampling import race_scores
from megatron_tip.selection.survey import Survey, take_survey, values_of

LossScale = Literal["selected", "valid"]


@dataclass(frozen=True)
class Selector:
    """Chooses the supervised rows of a rollout batch.

    Args:
        rule: a name of `rules.RULES`, or an import path "package.module:attribute" (see `load_rule`).
        retention_ratio: rho in (0, 1], the share of the valid rows to keep; 1 keeps all, whatever the rule.
        scope: what the budget is a share of: "batch", ceil(rho |I|) of the whole batch; "rollout", floor(rho m) of
            each rollout. None: as the rule was published.
        loss_scale: divide the summed loss by the number of rows "selected", or by the number "valid".
        seed: of the sampling rules.
        minimum_per_rollout: rows kept of a rollout so short that floor(rho m) is less; scope "rollout" only.
    """

    rule: str
    retention_ratio: float = 1.0
    scope: Scope | None = None
    loss_scale: LossScale = "selected"
    seed: int = 0
    minimum_per_rollout: int = 1

    def __post_init__(self) -> None:
        rule = load_rule(self.rule)
        if not 0.0 < self.retention_ratio <= 1.0:
            raise ConfigError(f"retention_ratio: expected a number in (0, 1], got {self.retention_ratio}")
        if rule.take == "all" and self.retention_ratio != 1.0:
            raise ConfigError(f"rule {self.rule!r} keeps every row: set retention_ratio = 1, or choose another rule")
        _check_choice("loss_scale", self.loss_scale, get_args(LossScale))
        _check_choice("scope", self.scope, ("batch", "rollout", None))
        if self.minimum_per_rollout < 0:
            raise ConfigError(f"minimum_per_rollout: expected 0 or more, got {self.minimum_per_rollout}")

    @property
    def resolved_rule(self) -> Rule:
        return load_rule(self.rule)

    @property
    def resolved_scope(self) -> Scope:
        return self.scope or self.resolved_rule.scope

    @property
    def keeps_all(self) -> bool:
        return self.retention_ratio == 1.0

    @property
    def required_statistics(self) -> frozenset[str]:
        """The fields of TokenStatistics without which `select` cannot work; empty if it needs no scoring pass."""
        return frozenset() if self.keeps_all else self.resolved_rule.required_statistics

    def select(
        self,
        statistics: TokenStatistics | None,
        index: TokenIndex,
        *,
        step: int,
        dp_group: dist.ProcessGroup | None = None,
    ) -> TokenSelection:
        """Returns the selection of this replica's rows, a pure function of the whole batch's set of rows.

        Args:
            statistics, index: this replica's rows, in any order; possibly none.
            step: of the training; feeds the sampling rules.
            dp_group: the data-parallel group; every rank of it must call. None: a single replica.

        Raises: InputError for a missing required statistic; TrainingError, alike on all ranks, for a batch without
        valid rows or budget, or scores that are not finite.
        """
        replicas = Replicas(dp_group)
        values = {} if statistics is None else values_of(statistics, STATISTICS)
        missing = sorted(self.required_statistics - values.keys())
        if missing:
            raise InputError(f"rule {self.rule!r} needs the statistics {missing}, which the run does not compute")
        rollout_budgets = self._rollout_budgets(index)
        num_budgeted = 0 if rollout_budgets is None else int(rollout_budgets[1].sum())
        survey = take_survey(index, values, num_budgeted, self.required_statistics, replicas)
        self._check_finite(survey)
        mask, metrics = self._keep(values, index, survey, rollout_budgets, step, replicas)
        num_selected = self._num_selected(survey)
        scale = 1.0 / (num_selected if self.loss_scale == "selected" else survey.num_valid)
        metrics = {
            "selection/num_valid": float(survey.num_valid),
            "selection/num_selected": float(num_selected),
            "selection/retention_ratio": num_selected / survey.num_valid,
            **metrics,
        }
        return TokenSelection(mask, mask.to(torch.float32) * scale, survey.num_valid, num_selected, metrics)

    def _check_finite(self, survey: Survey) -> None:
        broken = sorted(survey.not_finite & self.required_statistics)
        if broken:
            raise TrainingError(
                f"rule {self.rule!r}: the statistics {broken} hold NaN or infinity; the student or the teacher gives "
                "logits that are not finite"
            )

    def _rollout_budgets(self, index: TokenIndex) -> tuple[Tensor, Tensor] | None:
        """Returns, for scope "rollout", each row's place in the list of this replica's rollouts, and their budgets."""
        if self.resolved_scope != "rollout":
            return None
        _, place, lengths = torch.unique(index.rollout_index, return_inverse=True, return_counts=True)
        budgets = [
            rollout_budget(self.retention_ratio, length, self.minimum_per_rollout) for length in lengths.tolist()
        ]
        return place, torch.tensor(budgets, dtype=torch.int64, device=place.device)

    def _num_selected(self, survey: Survey) -> int:
        if self.keeps_all:
            return survey.num_valid
        if self.resolved_scope == "rollout":
            return survey.num_budgeted
        return batch_budget(self.retention_ratio, survey.num_valid)

    def _keep(
        self,
        values: Mapping[str, Tensor],
        index: TokenIndex,
        survey: Survey,
        rollout_budgets: tuple[Tensor, Tensor] | None,
        step: int,
        replicas: Replicas,
    ) -> tuple[Tensor, dict[str, float]]:
        if self.keeps_all:
            return torch.ones_like(index.position, dtype=torch.bool), {}
        scores = self._scores(values, index, survey, step, replicas)
        ties = TieOrder(
            index.rollout_index * survey.num_positions + index.position,
            max(1, (survey.num_rollouts * survey.num_positions).bit_length()),
        )
        if rollout_budgets is not None:
            place, budgets = rollout_budgets
            return rank_within_rollout(scores, index.rollout_index, ties) < budgets[place], {}
        (top,) = top_of_batch([scores], self._num_selected(survey), survey.num_valid, ties, replicas)
        return top.mask, {"selection/threshold": top.threshold}

    def _scores(
        self, values: Mapping[str, Tensor], index: TokenIndex, survey: Survey, step: int, replicas: Replicas
    ) -> Tensor:
        """Returns `[n]` float32, higher is kept. 3 all-reduces if the rule has normalisers."""
        rule = self.resolved_rule
        wanted: dict[str, tuple[float, ...]] = {}
        for item in rule.inputs:
            wanted[item.statistic] = (*wanted.get(item.statistic, ()), *item.normaliser.probabilities)
        found = quantiles(values, wanted, survey.num_valid, replicas)
        inputs = [
            item.normaliser.function(
                values[item.statistic].to(torch.float64),
                *(found[item.statistic, probability] for probability in item.normaliser.probabilities),
            )
            for item in rule.inputs
        ]
        scores = rule.score(*inputs) if rule.score else torch.ones_like(index.position, dtype=torch.float64)
        if rule.take == "sample":
            return race_scores(scores, uniform(self.seed, step, index))
        return (-scores if rule.take == "bottom" else scores).to(torch.float32)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
