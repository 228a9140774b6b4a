"""Tests over a handful of seeds: trainings are few, and vary more than the prompts that measure them."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

MIN_SEEDS = 5
"""The number of trainings below which nothing is concluded from them.

The smallest two-sided p of a sign test over n trainings is 2^(1 - n): 0.25 for 3 and 0.06 for 5. With fewer, a verdict
would rest on the assumption that trainings are normally distributed, which so few cannot contradict.
"""


def seed_p_value(values: Sequence[float]) -> float:
    """Returns the two-sided p of Student's t test that the mean over seeds is 0; NaN below two seeds.

    Equal values of all seeds have p = 0, or 1 if they are 0.
    """
    count = len(values)
    if count < 2:
        return float("nan")
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(count)
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean / error), count - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's adjusted p, in the same order: it keeps the chance of any false rejection; NaN stays NaN.

    Holds whatever the dependence between the tests, such as claims that share trainings.
    """
    values = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    adjusted = np.full(len(values), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted.tolist()
