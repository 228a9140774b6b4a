"""Metrics of a selection: quadrants, means of kept and dropped rows, positions, agreement with other rules.

All metrics are computed from sums over rows, so one all-reduce is enough.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from megatron_tip.selection.batch import Batch
from megatron_tip.selection.budget import Threshold
from megatron_tip.selection.order_statistics import Quantiles
from megatron_tip.selection.replicas import Replicas
from megatron_tip.statistics import STATISTICS

_DESCRIBED = tuple(name for name, statistic in STATISTICS.items() if statistic.described)
QUADRANT_DIVERGENCES = ("reverse_kl", "support_divergence", "forward_kl")
"""The candidates for the second axis of the quadrants, in order of preference."""
QUADRANTS = ("q1", "q2", "q3", "q4")
NUM_POSITION_BINS = 10

Sums = Mapping[str, float]


def sum_rows(rows: Mapping[str, Tensor], replicas: Replicas) -> Sums:
    """Returns the float64 sum of each `[n]` tensor over the rows of all replicas, equal on all. 1 all-reduce."""
    total = replicas.sum(torch.stack([tensor.sum(dtype=torch.float64) for tensor in rows.values()]))
    return dict(zip(rows, total.tolist(), strict=True))


def quadrant_axes(names: Collection[str], preferred: Collection[str]) -> tuple[str, ...]:
    """Returns the statistics of the quadrants' two axes, or an empty tuple if `names` lacks one.

    The first is the student's entropy. The second is the divergence that the rule itself reads (`preferred`), else
    TIP's reverse KL, else any available one.
    """
    candidates = [name for name in QUADRANT_DIVERGENCES if name in names]
    candidates.sort(key=lambda name: name not in preferred)
    return ("student_entropy", candidates[0]) if candidates and "student_entropy" in names else ()


def quadrant_rows(batch: Batch, quantiles: Quantiles, axes: Sequence[str]) -> dict[str, Tensor]:
    """Returns `[n]` bool for each quadrant (TIP), where "high" means above the batch median. Empty without axes."""
    if not axes:
        return {}
    entropy, divergence = (batch.values[name] > quantiles[name, 0.5] for name in axes)
    cuts = (entropy & divergence, entropy & ~divergence, ~entropy & divergence, ~entropy & ~divergence)
    return dict(zip(QUADRANTS, cuts, strict=True))


def described_rows(
    batch: Batch, mask: Tensor, quantiles: Quantiles, axes: Sequence[str], others: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the `[n]` rows whose sums `selection_metrics` reads.

    Args:
        mask: the kept rows. quantiles: must include the medians of both `axes`. others: the rows kept by each other
            rule, by its name.
    """
    counted: dict[str, Tensor] = {name: batch.values[name] for name in _DESCRIBED if name in batch.values}
    place = batch.index.position * NUM_POSITION_BINS // batch.num_positions
    counted |= {f"position_{k}": place == k for k in range(NUM_POSITION_BINS)}
    counted |= quadrant_rows(batch, quantiles, axes)
    rows = {"selected": mask}
    for name, of_all in counted.items():
        rows |= {f"all/{name}": of_all, f"kept/{name}": of_all * mask}
    return rows | {f"both/{name}": mask & other for name, other in others.items()}


def selection_metrics(sums: Sums, num_valid: int, quantiles: Quantiles, axes: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of a selection from the sums of `described_rows`, each named `selection/...`:

    - `num_valid`, `num_selected`, `retention_ratio`;
    - `kept_<statistic>_mean`, `dropped_<statistic>_mean`, if any rows were kept or dropped;
    - `median_<statistic>` of both axes, the thresholds of the quadrants ("high" is above the median); `q1_share` to
      `q4_share` of all rows, `kept_q1_share` to `kept_q4_share` of the kept rows;
    - `retention_position_<k>`: the share kept in the k-th tenth of the positions of the longest response;
    - `jaccard_<rule>`: rows kept by both rules over rows kept by either, with the same budget.
    """
    num_selected = sums["selected"]
    num_dropped = num_valid - num_selected
    metrics = {
        "num_valid": float(num_valid),
        "num_selected": num_selected,
        "retention_ratio": num_selected / num_valid,
        **{f"median_{name}": quantiles[name, 0.5] for name in axes},
    }
    for name in _DESCRIBED:
        if f"all/{name}" in sums:
            kept = sums[f"kept/{name}"]
            if num_selected:
                metrics[f"kept_{name}_mean"] = kept / num_selected
            if num_dropped:
                metrics[f"dropped_{name}_mean"] = (sums[f"all/{name}"] - kept) / num_dropped
    for name in QUADRANTS if axes else ():
        metrics[f"{name}_share"] = sums[f"all/{name}"] / num_valid
        if num_selected:
            metrics[f"kept_{name}_share"] = sums[f"kept/{name}"] / num_selected
    for k in range(NUM_POSITION_BINS):
        if num_rows := sums[f"all/position_{k}"]:
            metrics[f"retention_position_{k}"] = sums[f"kept/position_{k}"] / num_rows
    for name, both in sums.items():
        if name.startswith("both/"):
            metrics[f"jaccard_{name.removeprefix('both/')}"] = both / (2 * num_selected - both)
    return {f"selection/{name}": value for name, value in metrics.items()}


def threshold_metrics(threshold: Threshold | None, num_selected: int | None) -> dict[str, float]:
    """Returns the lowest kept score, and the share of kept rows that were chosen by the tie order."""
    if threshold is None:
        return {}
    if num_selected is None:  # a threshold of whole rollouts
        return {"selection/threshold": threshold.score}
    num_tied = threshold.num_tied if threshold.num_tied < threshold.num_equal else 0
    return {"selection/threshold": threshold.score, "selection/tied_share": num_tied / num_selected}
