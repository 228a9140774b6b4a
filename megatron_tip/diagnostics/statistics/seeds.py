"""Intervals over a handful of seeds: trainings are few, and vary more than the prompts that measure them."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from megatron_tip.diagnostics.statistics.bootstrap import LEVEL, Interval, without_spread

MIN_SEEDS = 5
"""The number of trainings below which nothing is concluded from them.

The smallest two-sided p of a sign test over n trainings is 2^(1 - n): 0.25 for 3 and 0.06 for 5. With fewer, a verdict
would rest on the assumption that trainings are normally distributed, which so few cannot contradict.
"""


def seed_interval(values: Sequence[float]) -> Interval:
    """Returns the mean over seeds with Student's t interval; no bounds with fewer than two seeds."""
    count = len(values)
    if count < 2:
        return without_spread(float(np.mean(values)) if count else float("nan"), 0)
    mean = float(np.mean(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half)
