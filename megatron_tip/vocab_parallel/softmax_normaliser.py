"""The combination of sums that each rank computes in the frame of its own maximum."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftmaxNormaliser:
    """The log-partition function of student and teacher, in every rank's frame.

    In the frame of rank r, a logit z is x = z - maxima[r], and its log-probability is x - lse[r]. Over the whole
    vocabulary it is z - top - log_sum. Ids with mass thus need only differences of small numbers, and equal models give
    bit-equal results. The last dimension is the model: (student, teacher), or one.
    """

    maxima: Tensor  # [tp, c, m]
    lse: Tensor  # [tp, c, m]
    top: Tensor  # [c, m]
    log_sum: Tensor  # [c, m]

    @classmethod
    def of(cls, maxima: Tensor, sums: Tensor) -> "SoftmaxNormaliser":
        """Returns the normaliser for every rank's `[tp, c, m]` maxima and sums of exp(z - maximum)."""
        top = maxima.amax(0)
        log_sum = (sums * (maxima - top).exp()).sum(0).log()
        return cls(maxima, log_sum + (top - maxima), top, log_sum)

    def expectation(self, model: int, sum_e: Tensor, sum_e_value: Tensor, shift: Tensor) -> Tensor:
        """Returns the `[c]` mean of value + shift under a model, from every rank's `[tp, c]` Σe and Σe x value."""
        weight = (-self.lse[..., model]).exp()
        return (weight * (sum_e_value + shift * sum_e)).sum(0)

    def offsets(self, rank: int) -> Tensor:
        """Returns the `[c, 2 m]` maxima and lse of the frame of `rank`, as kernels take them."""
        return torch.cat([self.maxima[rank], self.lse[rank]], 1)

    @property
    def log_ratio_shift(self) -> Tensor:
        """The `[tp, c]` term that turns d = x_s - x_t into ln(p / q) in each rank's frame."""
        return self.lse[..., 1] - self.lse[..., 0]

    def logprobs(self, logits: Tensor, model: int) -> Tensor:
        """Returns `[c, k]` log-probabilities of a model's `[c, k]` logits."""
        return logits - self.top[:, model, None] - self.log_sum[:, model, None]
