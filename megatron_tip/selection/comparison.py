"""A comparison of all rules on one batch: what each would keep, and how far they agree."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import ConfigError
from megatron_tip.records import TokenIndex
from megatron_tip.selection.batch import read_batch, read_values
from megatron_tip.selection.metrics import quadrant_axes, quadrant_rows
from megatron_tip.selection.order_statistics import quantiles
from megatron_tip.selection.replicas import Replicas
from megatron_tip.selection.rule import Scope
from megatron_tip.selection.rules import PAPERS_RULES
from megatron_tip.selection.selector import Selector
from megatron_tip.statistics import TokenStatistics


@dataclass(frozen=True)
class RuleComparison:
    """A comparison of rules at one budget and scope; all but `masks` over all replicas, and the same on all.

    `names`: of the rules. `masks`: `[rules, n]` bool, this replica's rows. `num_selected`: `[rules]` int64.
    `jaccard`: `[rules, rules]` float64, rows kept by both over rows kept by either. `quadrants`: `[rules, 4]` float64,
    the share of each rule's rows in Q1 to Q4, cut at the batch medians of `axes`; `[rules, 0]` without both statistics.
    `tied_shares`: of each rule's rows, those that only the tie order chose; NaN where each rollout has its own budget.
    """

    names: tuple[str, ...]
    masks: Tensor
    num_selected: Tensor
    jaccard: Tensor
    axes: tuple[str, ...]
    quadrants: Tensor
    tied_shares: tuple[float, ...]


def compare_rules(
    statistics: TokenStatistics,
    index: TokenIndex,
    *,
    retention_ratio: float,
    scope: Scope = "batch",
    divergence: str = "reverse_kl",
    seed: int = 0,
    dp_group: dist.ProcessGroup | None = None,
) -> RuleComparison:
    """Returns the comparison of all published rules, except "full", that the statistics allow.

    Args:
        statistics, index: this replica's rows, as for `Selector.select`.
        seed: of the first rule; each further rule has the next seed.
        divergence: the statistic that cuts the quadrants along with the student's entropy, if available.
    """
    if scope not in ("batch", "rollout"):
        raise ConfigError(f"compare_rules: expected scope 'batch' or 'rollout', got {scope!r}")
    replicas = Replicas(dp_group)
    batch = read_batch(read_values(statistics), index, replicas)
    axes = quadrant_axes(batch.values, {divergence})
    names = [n for n, r in PAPERS_RULES.items() if r.take != "all" and r.required_statistics <= batch.values.keys()]
    # a separate seed for each: with the same draws, two sampling rules would agree spuriously
    seeds = range(seed, seed + len(names))
    selectors = (Selector(n, retention_ratio, scope, seed=s, compare=False) for n, s in zip(names, seeds, strict=True))
    selections = [s.select(statistics, index, step=0, dp_group=dp_group) for s in selectors]
    masks = torch.stack([selection.selection_mask for selection in selections])
    medians = quantiles(batch.values, {(name, 0.5) for name in axes}, batch.num_valid, replicas)
    quadrants = quadrant_rows(batch, medians, axes).values()
    columns = torch.cat([masks, torch.stack(list(quadrants))]) if quadrants else masks
    counts = replicas.sum(masks.double() @ columns.double().T)
    both, of_quadrants = counts[:, : len(names)], counts[:, len(names) :]
    num_selected = both.diagonal()
    return RuleComparison(
        names=tuple(names),
        masks=masks,
        num_selected=num_selected.long(),
        jaccard=both / (num_selected[:, None] + num_selected - both),
        axes=axes,
        quadrants=of_quadrants / num_selected[:, None],
        tied_shares=tuple(selection.metrics.get("selection/tied_share", float("nan")) for selection in selections),
    )
