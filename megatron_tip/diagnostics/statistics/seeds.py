"""Intervals over a handful of seeds: trainings are few, and vary more than the prompts that measure them."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from megatron_tip.diagnostics.statistics.bootstrap import LEVEL, Interval, without_spread


def seed_interval(values: Sequence[float]) -> Interval:
    """Returns the mean over seeds with Student's t interval; no bounds with fewer than two seeds."""
    count = len(values)
    if count < 2:
        return without_spread(float(np.mean(values)) if count else float("nan"), 0)
    mean = float(np.mean(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half)
