"""The selector of the supervised rows of a rollout batch, with the same result for the same statistics."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import InputError, TrainingError
from megatron_tip.records import TokenIndex, TokenSelection
from megatron_tip.selection.batch import Batch, read_batch, read_values
from megatron_tip.selection.budget import (
    BatchBudget,
    Budget,
    NoBudget,
    RolloutBudget,
    WholeRolloutsBudget,
    batch_budget,
)
from megatron_tip.selection.loss_scale import inclusion, row_weights
from megatron_tip.selection.metrics import (
    Sums,
    described_rows,
    quadrant_axes,
    selection_metrics,
    sum_rows,
    threshold_metrics,
)
from megatron_tip.selection.order_statistics import quantiles
from megatron_tip.selection.places import Places
from megatron_tip.selection.ranking import Draws, NormalisedInputs, Ranking, Stream, rank_rows
from megatron_tip.selection.replicas import Replicas
from megatron_tip.selection.rule import Rule
from megatron_tip.selection.settings import SelectionSettings
from megatron_tip.selection.weights import row_factors
from megatron_tip.statistics import TokenStatistics


class Selector(SelectionSettings):
    """The selector of the supervised rows of a rollout batch. It takes the arguments of SelectionSettings."""

    def select(
        self,
        statistics: TokenStatistics | None,
        index: TokenIndex,
        *,
        step: int,
        dp_group: dist.ProcessGroup | None = None,
    ) -> TokenSelection:
        """Returns the selection of this replica's rows.

        Masks and weights depend only on the set of rows of the whole batch, so they are the same on every layout with
        the same statistics.

        Args:
            statistics: of this replica's rows, in any order, possibly empty. None only if the rule requires none.
            index: of the same rows, on the same device, which must suit the group's backend. For scope "rollout", all
                rows of a rollout must be on one replica.
            step: the training step, which seeds the random draws.
            dp_group: the data-parallel group; all its ranks must call. None: a single replica.

        Collectives: 1 all-gather of a few integers and at most 7 all-reduces of small histograms and sums, plus
        ceil(bits of the token order / 11) if ties straddle a threshold.

        Raises:
            InputError: a statistic is missing, or (on all ranks) an index does not match.
            TrainingError: the batch has no valid rows or no budget, or scores are not finite; on all ranks.
        """
        return self.select_among(Replicas(dp_group), statistics, index, step)

    def select_among(
        self, replicas: Replicas, statistics: TokenStatistics | None, index: TokenIndex, step: int
    ) -> TokenSelection:
        """Returns the same as `select`, for any kind of replicas."""
        batch, budget = self._read(statistics, index, replicas)
        rules = [self.active_rule, *self.compared_rules(batch.values)]
        axes = quadrant_axes(batch.values, self.resolved_rule.required_statistics)
        wanted = {(name, 0.5) for name in axes}.union(*(rule.required_quantiles for rule in rules))
        found = quantiles(batch.values, wanted, batch.num_valid, replicas)
        inputs = NormalisedInputs(batch, found)
        rankings = self._rank(rules, batch, inputs, step)
        kept, *kept_by_others = budget.keep(
            [ranking.scores for ranking in rankings],
            self.tie_order(batch, step),
            with_runner_up=self.loss_scale == "importance",
        )
        factors = row_factors(self.active_rule, Places(index), inputs, self.progress(step))
        mask = kept.mask & factors.is_positive() if factors else kept.mask
        others = {rule.name: other.mask for rule, other in zip(rules[1:], kept_by_others, strict=True)}
        described = described_rows(batch, mask, found, axes, others)
        bad = factors.is_bad() if factors else torch.zeros_like(mask)
        sums = sum_rows({**described, "nan": rankings[0].scores.isnan(), "kept": kept.mask, "bad": bad}, replicas)
        self._check_sums(sums, budget.num_selected)
        num_selected = int(sums["selected"])
        metrics = selection_metrics(sums, batch.num_valid, found, axes)
        metrics |= threshold_metrics(kept.threshold, budget.num_selected)
        chance = inclusion(self.active_rule, rankings[0], kept, budget)
        weights = row_weights(mask, self.loss_scale, batch.num_valid, num_selected, chance)
        return TokenSelection(
            selection_mask=mask,
            row_weights=_times(weights, factors.main) if factors else weights,
            num_valid=batch.num_valid,
            num_selected=num_selected,
            metrics=metrics,
            scores=rankings[0].rule_scores(self.active_rule),
            term_weights={name: _times(weights, own) for name, own in factors.terms.items()} if factors else {},
        )

    def _read(self, statistics: TokenStatistics | None, index: TokenIndex, replicas: Replicas) -> tuple[Batch, Budget]:
        """Returns the batch and its budget. 1 all-gather."""
        scope, num_budgeted = "all" if self.keeps_all else self.resolved_scope, 0
        own = None
        if scope == "rollout":
            rounding = self.resolved_rule.rounding
            own = RolloutBudget.of(index, self.retention_ratio, self.minimum_per_rollout, rounding)
            num_budgeted = own.num_selected
        elif scope == "whole_rollouts":
            num_budgeted = len(index.rollout_index.unique())
        values = read_values(statistics, self.required_statistics)
        if missing := sorted(self.required_statistics - values.keys()):
            raise InputError(f"rule {self.rule!r} needs the statistics {missing}, which the run does not compute")
        batch = read_batch(
            values,
            index,
            replicas,
            required=self.required_statistics,
            rule_name=self.rule,
            num_budgeted=num_budgeted,
        )
        if scope == "all":
            return batch, NoBudget(batch.num_valid)
        if scope == "whole_rollouts":
            num_kept = batch_budget(self.retention_ratio, batch.num_budgeted)
            among = BatchBudget(num_kept, batch.num_budgeted, replicas)
            return batch, WholeRolloutsBudget(among, Places(index).rollouts)
        if own is None:
            return batch, BatchBudget(batch_budget(self.retention_ratio, batch.num_valid), batch.num_valid, replicas)
        if batch.num_budgeted == 0:
            raise TrainingError(
                f"scope 'rollout': floor({self.retention_ratio} m) is 0 for every rollout of the batch, so nothing is "
                "supervised; raise retention_ratio or minimum_per_rollout"
            )
        return batch, replace(own, num_selected=batch.num_budgeted)

    def _rank(self, rules: list[Rule], batch: Batch, inputs: NormalisedInputs, step: int) -> list[Ranking]:
        """Returns each rule's ranking; the first rule is the active one."""
        active, compared = (Draws(self.seed, step, stream) for stream in (Stream.ACTIVE, Stream.COMPARED))
        return [rank_rows(rule, batch, inputs, compared if place else active) for place, rule in enumerate(rules)]

    def _check_sums(self, sums: Sums, num_budgeted: int | None) -> None:
        """Raises on all ranks if scores or rows cannot be ranked, or weights cannot be used."""
        if num_nan := int(sums["nan"]):
            raise TrainingError(
                f"rule {self.rule!r}: {num_nan} scores are NaN although {sorted(self.required_statistics)} are finite; "
                "fix the score function"
            )
        if num_budgeted is not None and sums["kept"] != num_budgeted:
            raise InputError(
                f"token index: {int(sums['kept'])} rows were kept instead of {num_budgeted}, so a (rollout_index, "
                "position) pair occurs more than once; pairs must be unique"
            )
        if sums["bad"]:
            raise TrainingError(
                f"rule {self.rule!r}: expected finite weights of at least 0, got {int(sums['bad'])} others; fix its "
                "weight function or selection.parameters"
            )
        if not sums["selected"]:
            raise TrainingError(f"rule {self.rule!r}: every token of the batch weighs 0, so nothing is supervised")


def _times(weights: Tensor, factors: Tensor) -> Tensor:
    """Returns the product of `[n]` float32 weights and float64 factors, float32."""
    return (weights * factors).to(torch.float32)
