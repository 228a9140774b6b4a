"""Brings together the sums that each rank made in the frame of its own maximum."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SoftmaxNormaliser:
    """The log-partition function of student and teacher, in every rank's frame.

    In the frame of rank r a logit z is x = z - maxima[r], and its log-probability x - lse[r]. `top` and `log_sum` are
    the same for the whole vocabulary: z - top - log_sum. Whatever carries mass is then a small number less a small
    number, and equal models come out equal to the bit. The last dimension is the model: (student, teacher), or one.
    """

    maxima: Tensor  # [tp, c, m]
    lse: Tensor  # [tp, c, m]
    top: Tensor  # [c, m]
    log_sum: Tensor  # [c, m]

    @classmethod
    def of(cls, maxima: Tensor, sums: Tensor) -> "SoftmaxNormaliser":
        """From every rank's `[tp, c, m]` maxima and sums of exp(z - maximum)."""
        top = maxima.amax(0)
        log_sum = (sums * (maxima - top).exp()).sum(0).log()
        return cls(maxima, log_sum + (top - maxima), top, log_sum)

    def expectation(self, model: int, sum_e: Tensor, sum_e_value: Tensor, shift: Tensor) -> Tensor:
        """`[c]` mean of value + shift under a model, from every rank's `[tp, c]` Σe and Σe x value."""
        weight = (-self.lse[..., model]).exp()
        return (weight * (sum_e_value + shift * sum_e)).sum(0)

    @property
    def log_ratio_shift(self) -> Tensor:
        """`[tp, c]` what makes ln(p / q) of d = x_s - x_t in each rank's frame."""
        return self.lse[..., 1] - self.lse[..., 0]

    def logprobs(self, logits: Tensor, model: int) -> Tensor:
        """`[c, k]` log-probabilities of `[c, k]` logits of a model."""
        return logits - self.top[:, model, None] - self.log_sum[:, model, None]
