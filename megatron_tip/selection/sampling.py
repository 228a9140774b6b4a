"""Sampling without replacement as a top-n: the exponential race of Efraimidis and Spirakis (2006).

Row t arrives at time E_t / w_t, with E_t exponential; the n first arrivals are a sample drawn one by one, each draw
with probability proportional to the weights left. The race score is the reciprocal of the arrival time, w_t / E_t, so
that the first arrivals are the highest scores.
"""

from __future__ import annotations

import torch
from torch import Tensor


def race_scores(weights: Tensor, uniform: Tensor) -> Tensor:
    """Returns `[n]` float32 w / E with E = -ln u. Rows of weight 0 come last, in tie order.

    Args:
        weights: `[n]` float64; below 0 counts as 0.
        uniform: `[n]` float64 in (0, 1).
    """
    return (weights.clamp(min=0.0) / -torch.log(uniform)).to(torch.float32)
