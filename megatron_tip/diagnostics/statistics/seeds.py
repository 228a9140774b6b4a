"""Intervals over a handful of seeds: trainings are few, and vary more than the prompts that measure them."""

from collections.abc import Sequence

from megatron_tip.diagnostics.statistics.bootstrap import Interval, without_spread
from megatron_tip.report.seeds import mean_and_half


def seed_interval(values: Sequence[float]) -> Interval:
    """Returns the mean over seeds with Student's t interval; no bounds with fewer than two seeds."""
    mean, half = mean_and_half(values)
    return Interval(mean, mean - half, mean + half) if len(values) > 1 else without_spread(mean, 0)
