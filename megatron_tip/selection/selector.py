"""The selector of the supervised rows of a rollout batch, with the same result on every layout."""

from dataclasses import replace

import torch.distributed as dist

from megatron_tip.errors import InputError, TrainingError
from megatron_tip.records import TokenIndex, TokenSelection
from megatron_tip.selection.batch import Batch, read_batch, read_values
from megatron_tip.selection.budget import BatchBudget, Budget, NoBudget, RolloutBudget, batch_budget
from megatron_tip.selection.loss_scale import inclusion, row_weights
from megatron_tip.selection.metrics import (
    Sums,
    described_rows,
    quadrant_axes,
    selection_metrics,
    sum_rows,
    threshold_metrics,
)
from megatron_tip.selection.order_statistics import Quantiles, quantiles
from megatron_tip.selection.ranking import Draws, NormalisedInputs, Ranking, Stream, rank_rows
from megatron_tip.selection.replicas import Replicas
from megatron_tip.selection.rules import Rule
from megatron_tip.selection.settings import SelectionSettings
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

        Masks and weights depend only on the set of rows of the whole batch, so they are the same on every layout.

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
        rankings = self._rank(rules, batch, found, step)
        kept, *kept_by_others = budget.keep(
            [ranking.scores for ranking in rankings],
            self.tie_order(batch, step),
            with_runner_up=self.loss_scale == "importance",
        )
        others = {rule.name: other.mask for rule, other in zip(rules[1:], kept_by_others, strict=True)}
        described = described_rows(batch, kept.mask, found, axes, others)
        sums = sum_rows({**described, "nan": rankings[0].scores.isnan()}, replicas)
        self._check_sums(sums, budget.num_selected)
        metrics = selection_metrics(sums, batch.num_valid, found, axes)
        metrics |= threshold_metrics(kept.threshold, budget.num_selected)
        chance = inclusion(self.active_rule, rankings[0], kept, budget)
        weights = row_weights(kept.mask, self.loss_scale, batch.num_valid, budget.num_selected, chance)
        scores = rankings[0].rule_scores(self.active_rule)
        return TokenSelection(kept.mask, weights, batch.num_valid, budget.num_selected, metrics, scores)

    def _read(self, statistics: TokenStatistics | None, index: TokenIndex, replicas: Replicas) -> tuple[Batch, Budget]:
        """Returns the batch and its budget. 1 all-gather."""
        per_rollout = self.resolved_scope == "rollout" and not self.keeps_all
        own = RolloutBudget.of(index, self.retention_ratio, self.minimum_per_rollout) if per_rollout else None
        values = read_values(statistics, self.required_statistics)
        if missing := sorted(self.required_statistics - values.keys()):
            raise InputError(f"rule {self.rule!r} needs the statistics {missing}, which the run does not compute")
        batch = read_batch(
            values,
            index,
            replicas,
            required=self.required_statistics,
            rule_name=self.rule,
            num_budgeted=own.num_selected if own else 0,
        )
        if self.keeps_all:
            return batch, NoBudget(batch.num_valid)
        if own is None:
            return batch, BatchBudget(batch_budget(self.retention_ratio, batch.num_valid), batch.num_valid, replicas)
        if batch.num_budgeted == 0:
            raise TrainingError(
                f"scope 'rollout': floor({self.retention_ratio} m) is 0 for every rollout of the batch, so nothing is "
                "supervised; raise retention_ratio or minimum_per_rollout"
            )
        return batch, replace(own, num_selected=batch.num_budgeted)

    def _rank(self, rules: list[Rule], batch: Batch, found: Quantiles, step: int) -> list[Ranking]:
        """Returns each rule's ranking; the first rule is the active one."""
        inputs = NormalisedInputs(batch, found)
        active, compared = (Draws(self.seed, step, stream) for stream in (Stream.ACTIVE, Stream.COMPARED))
        return [rank_rows(rule, batch, inputs, compared if place else active) for place, rule in enumerate(rules)]

    def _check_sums(self, sums: Sums, num_selected: int) -> None:
        """Raises on all ranks if scores or rows cannot be ranked."""
        if num_nan := int(sums["nan"]):
            raise TrainingError(
                f"rule {self.rule!r}: {num_nan} scores are NaN although {sorted(self.required_statistics)} are finite; "
                "fix the score function"
            )
        if sums["selected"] != num_selected:
            raise InputError(
                f"token index: {int(sums['selected'])} rows were kept instead of {num_selected}, so a (rollout_index, "
                "position) pair occurs more than once; pairs must be unique"
            )
