"""Normalisers, which put a statistic on a common scale with a few quantiles of the whole batch.

Minimum and maximum are the quantiles 0 and 1, so normalisers need only quantiles. All arithmetic is float64 without
transcendental functions, so results are the same on every layout and in numpy.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

EPSILON = 1e-8


def robust(values: Tensor, low: float, high: float) -> Tensor:
    """Returns clip((z - Q.05) / (Q.95 - Q.05 + epsilon), 0, 1): Norm_B of TA-OPD, Eq. 11; epsilon = 1e-8."""
    return ((values - low) / (high - low + EPSILON)).clamp(0.0, 1.0)


def min_max(values: Tensor, low: float, high: float) -> Tensor:
    """Returns (z - min) / (max - min); zeros if all values are equal. TIP, for the divergence."""
    return (values - low) / ((high - low) or 1.0)


def clipped_min_max(values: Tensor, low: float, high: float) -> Tensor:
    """Returns the min-max of min(z, Q.98): TIP, for the entropy. After the clip, the maximum is Q.98 itself."""
    return min_max(values.clamp(max=high), low, high)


def above_median(values: Tensor, median: float) -> Tensor:
    """Returns 1 where z > Q.5 and 0 elsewhere: the quadrants' cut in TA-OPD's runs."""
    return (values > median).to(values.dtype)


def by_maximum(values: Tensor, high: float) -> Tensor:
    """Returns z / max of values that are at least 0; zeros if all are 0. FiRe, for both entropies."""
    return values / (high or 1.0)


def raw(values: Tensor) -> Tensor:
    """Returns the values unchanged."""
    return values


@dataclass(frozen=True)
class Normaliser:
    """A normaliser: its name, the quantiles that it needs, and its function of the values and those quantiles."""

    name: str
    probabilities: tuple[float, ...]
    function: Callable[..., Tensor]


ROBUST = Normaliser("robust", (0.05, 0.95), robust)
MIN_MAX = Normaliser("min_max", (0.0, 1.0), min_max)
CLIPPED_MIN_MAX = Normaliser("clipped_min_max", (0.0, 0.98), clipped_min_max)
ABOVE_MEDIAN = Normaliser("above_median", (0.5,), above_median)
BY_MAXIMUM = Normaliser("by_maximum", (1.0,), by_maximum)
RAW = Normaliser("raw", (), raw)

NORMALISERS = {n.name: n for n in (ROBUST, MIN_MAX, CLIPPED_MIN_MAX, ABOVE_MEDIAN, BY_MAXIMUM, RAW)}
