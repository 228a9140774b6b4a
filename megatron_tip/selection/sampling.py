"""Sampling without replacement as a top-n: the exponential race of Efraimidis and Spirakis (2006).

Row t arrives at time E_t / w_t, with E_t exponential. The first n arrivals are a sample drawn one by one, each draw
with probability proportional to the remaining weights. The race score is the reciprocal of the arrival time, w_t / E_t,
so the first arrivals have the highest scores.
"""

import torch
from torch import Tensor


def race_scores(weights: Tensor, uniform: Tensor) -> Tensor:
    """Returns the race scores w / E with E = -ln u, `[n]` float32. Rows of weight 0 come last, in tie order.

    Args:
        weights: `[n]` float64; negative ones count as 0.
        uniform: `[n]` float64 in (0, 1).
    """
    return (weights.clamp(min=0.0) / -torch.log(uniform)).to(torch.float32)


def inclusion_probabilities(weights: Tensor, runner_up: Tensor | float) -> Tensor:
    """Returns p_t = 1 - exp(-w_t T), `[n]` float64, with T the arrival time of the first row not drawn.

    p_t is exactly the probability that row t arrives before T, given the arrivals of all other rows. Hence the sum over
    the drawn rows of g_t / p_t is an unbiased estimate of the sum over all rows of positive weight ("rank
    conditioning", Cohen and Kaplan 2007). It is not the unconditional inclusion probability, which has no closed form.

    Args:
        weights: `[n]` float64. runner_up: the race score 1 / T, `[n]` or one number; 0 if all rows, or all rows of
            positive weight, were drawn: p_t is then 1.
    """
    time = 1.0 / torch.as_tensor(runner_up, dtype=torch.float64, device=weights.device)
    return torch.where(time.isinf(), 1.0, -torch.expm1(-weights.clamp(min=0.0) * time))
