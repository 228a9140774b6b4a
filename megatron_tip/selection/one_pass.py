"""Selection of one micro-batch at a time, during training: no scoring forward pass, no collective.

Either the budget is a share of each micro-batch (scope "micro_batch"), or an earlier batch's quantiles and threshold
replace this one's (scope "batch" with a `Calibration`): the budget is then met on average, not exactly.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import InputError, TrainingError
from megatron_tip.records import TokenIndex, TokenSelection
from megatron_tip.selection.batch import Batch, read_batch, read_values
from megatron_tip.selection.budget import BatchBudget, batch_budget
from megatron_tip.selection.calibration import BatchTotals, Calibration
from megatron_tip.selection.loss_scale import inclusion, row_weights
from megatron_tip.selection.metrics import sum_rows
from megatron_tip.selection.order_statistics import Quantiles, quantiles
from megatron_tip.selection.ranking import Draws, NormalisedInputs, Ranking, Stream, rank_rows
from megatron_tip.selection.replicas import Replicas
from megatron_tip.selection.sampling import inclusion_probabilities
from megatron_tip.selection.settings import SelectionSettings
from megatron_tip.statistics import TokenStatistics


def batch_totals(
    settings: SelectionSettings, micro_batch_rows: Tensor, *, dp_group: dist.ProcessGroup | None = None
) -> BatchTotals:
    """Returns the whole batch's totals that the row weights need before any row is scored. 1 all-reduce.

    `num_selected` is exact for scope "micro_batch"; with a calibration it is the expected number, ceil(rho |I|).

    Args:
        micro_batch_rows: `[micro-batches]` int64, valid rows of each of this replica's micro-batches.
        dp_group: every rank of it must call.

    Raises:
        TrainingError: on all ranks; the batch has no valid rows.
    """
    budgets = [batch_budget(settings.retention_ratio, num_rows) for num_rows in micro_batch_rows.tolist()]
    own = torch.stack([micro_batch_rows.sum(), torch.tensor(sum(budgets), device=micro_batch_rows.device)])
    num_valid, num_selected = Replicas(dp_group).sum(own).tolist()
    if num_valid == 0:
        raise TrainingError("the rollout batch has no valid token: every loss_mask is empty on every replica")
    if settings.resolved_scope != "micro_batch":
        num_selected = batch_budget(settings.retention_ratio, num_valid)
    return BatchTotals(num_valid, num_selected)


def select_micro_batch(
    settings: SelectionSettings,
    statistics: TokenStatistics | None,
    index: TokenIndex,
    *,
    step: int,
    totals: BatchTotals,
    calibration: Calibration | None = None,
) -> TokenSelection:
    """Returns the selection of one micro-batch's rows, possibly none; no communication, no metrics.

    Scope "micro_batch": the best ceil(rho m) of its m rows, normalised by its own quantiles. Selection and budget
    therefore depend on how the batch is cut into micro-batches. Scope "batch" with a `calibration`: the rows whose
    scores, under that batch's quantiles, exceed its threshold, and a random `tie_share` of the rows exactly at it.

    Raises:
        InputError: a statistic or calibration is missing, or the index does not fit.
        TrainingError: scores are not finite. Other replicas do not learn of it: the caller must end the run.
    """
    if len(index) == 0:
        empty = torch.zeros_like(index.position, dtype=torch.bool)
        return TokenSelection(empty, empty.float(), totals.num_valid, totals.num_selected, {})
    values = read_values(statistics, settings.required_statistics)
    if missing := sorted(settings.required_statistics - values.keys()):
        raise InputError(f"rule {settings.rule!r} needs the statistics {missing}, which the run does not compute")
    required = settings.required_statistics
    batch = read_batch(values, index, Replicas(), required=required, rule_name=settings.rule)
    if settings.keeps_all:
        mask, chance, scores = torch.ones_like(index.position, dtype=torch.bool), 1.0, None
    elif calibration is not None and settings.resolved_scope == "batch":
        mask, chance, scores = _keep_above_threshold(settings, batch, calibration, step)
    elif settings.resolved_scope == "micro_batch":
        mask, chance, scores = _keep_best(settings, batch, step)
    else:
        raise InputError(
            f"select_micro_batch: scope {settings.resolved_scope!r} needs the whole batch: call Selector.select, or "
            "use scope 'micro_batch', or scope 'batch' with the calibration of an earlier step"
        )
    weights = row_weights(mask, settings.loss_scale, totals.num_valid, totals.num_selected, chance)
    return TokenSelection(mask, weights, totals.num_valid, totals.num_selected, {}, scores)


def agreement(mask: Tensor, exact_mask: Tensor, *, dp_group: dist.ProcessGroup | None = None) -> float:
    """Returns the Jaccard agreement of a one-pass mask with the exact one: rows in both over rows in either.

    Over all replicas, and the same on all; 1 if both are empty. 1 all-reduce.
    """
    sums = sum_rows({"both": mask & exact_mask, "either": mask | exact_mask}, Replicas(dp_group))
    return sums["both"] / sums["either"] if sums["either"] else 1.0


def _keep_best(settings: SelectionSettings, batch: Batch, step: int) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """Returns the mask, each row's probability of selection and the rule's scores, from this micro-batch alone."""
    rule = settings.resolved_rule
    found = quantiles(batch.values, rule.required_quantiles, batch.num_valid, batch.replicas)
    ranking = _rank(settings, batch, found, step)
    num_kept = batch_budget(settings.retention_ratio, batch.num_valid)
    budget = BatchBudget(num_kept, batch.num_valid, batch.replicas)
    (kept,) = budget.keep([ranking.scores], settings.tie_order(batch, step), with_runner_up=True)
    return kept.mask, inclusion(rule, ranking, kept, budget), ranking.rule_scores(rule)


def _keep_above_threshold(
    settings: SelectionSettings, batch: Batch, calibration: Calibration, step: int
) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """Returns the mask, each row's probability of selection and the rule's scores, from an earlier batch's statistics.

    A fixed threshold draws each row independently, with probability 1 - exp(-w / threshold).
    """
    ranking = _rank(settings, batch, calibration.as_quantiles(), step)
    ties = Draws(settings.seed, step, Stream.TIES).of(batch.index) < calibration.tie_share
    at_threshold = ranking.scores == calibration.threshold
    mask = (ranking.scores > calibration.threshold) | (at_threshold & ties)
    chance = inclusion_probabilities(ranking.weights, calibration.threshold)
    return mask, chance, ranking.rule_scores(settings.resolved_rule)


def _rank(settings: SelectionSettings, batch: Batch, found: Quantiles, step: int) -> Ranking:
    """Returns the active rule's ranking of this micro-batch. Raises TrainingError for NaN scores."""
    draws = Draws(settings.seed, step, Stream.ACTIVE)
    ranking = rank_rows(settings.resolved_rule, batch, NormalisedInputs(batch, found), draws)
    settings.check_scores(int(ranking.scores.isnan().sum()))
    return ranking
