"""The mean of a handful of seeds and how sure it is."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean over seeds and half the width of Student's t interval; NaN where too few tell it."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)) if count else float("nan"), float("nan")
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return float(np.mean(values)), half
