"""Arithmetic on one rank's logits: plain tensors in and out, no collectives, no loops over rows.

`z_s`, `z_t`: `[r, v]` float32 logits of student and teacher over the ids that this rank owns. Sums are in this rank's
*frame*: x = z - maximum over its ids, e = exp(x), d = x_s - x_t. softmax_normaliser.py combines the frames of all
ranks. Scratch tensors have a block's shape; None allocates new memory.

The gradient of a divergence follows its sums, on the same tensors: the sums may turn the logits into what the gradient
needs, and the gradient takes the place of z_s. `offsets`: `[r, 4]` maxima and lse of both models in this rank's frame.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_tip.vocab_parallel.topk import group_maxima

Scratch = Sequence[Tensor | None]
NUM_SCRATCH = 4

# The maximum of a shard without real ids: below every logit, but finite to avoid inf - inf.
NO_MAXIMUM = -1e30


def _maximum(z: Tensor) -> Tensor:
    return z.amax(-1, keepdim=True) if z.shape[1] else z.new_full((z.shape[0], 1), NO_MAXIMUM)


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)


def statistics_sums(z_s: Tensor, z_t: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `[r, 8]` maxima, Σe_s, Σe_t, Σe_s x_s, Σe_t x_t, Σe_s d, Σe_t d; and both group maxima for the top-K."""
    groups_s, groups_t = group_maxima(z_s), group_maxima(z_t)
    max_s, max_t = _maximum(groups_s), _maximum(groups_t)
    x_s, x_t = torch.sub(z_s, max_s, out=scratch[0]), torch.sub(z_t, max_t, out=scratch[1])
    e = torch.exp(x_s, out=scratch[2])
    sum_s, sum_s_x = _sum(e), _sum(torch.mul(e, x_s, out=scratch[3]))
    d = x_s.sub_(x_t)
    sum_s_d = _sum(e.mul_(d))
    e = torch.exp(x_t, out=e)
    sum_t, sum_t_x = _sum(e), _sum(x_t.mul_(e))
    sum_t_d = _sum(e.mul_(d))
    return torch.cat([max_s, max_t, sum_s, sum_t, sum_s_x, sum_t_x, sum_s_d, sum_t_d], 1), groups_s, groups_t


def partition_sums(*models_and_scratch: Any) -> tuple[Tensor]:
    """Returns `[r, 2 m]` maxima and Σe of m models' logits, maxima first. Does not change the logits."""
    *models, scratch = models_and_scratch
    maxima = [_maximum(z) for z in models]
    sums = [_sum(torch.sub(z, m, out=scratch[0]).exp_()) for z, m in zip(models, maxima, strict=True)]
    return (torch.cat([*maxima, *sums], 1),)


def entropy_and_topk_sums(z: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Returns `[r, 3]` maximum, Σe, Σe x; and the group maxima for the top-K. Does not change z."""
    groups = group_maxima(z)
    maximum = _maximum(groups)
    x = torch.sub(z, maximum, out=scratch[0])
    e = torch.exp(x, out=scratch[1])
    return torch.cat([maximum, _sum(e), _sum(torch.mul(e, x, out=scratch[2]))], 1), groups


def reverse_kl_sums(z_s: Tensor, z_t: Tensor, scratch: Scratch) -> tuple[Tensor]:
    """Returns `[r, 5]` maxima, Σe_s, Σe_t, Σe_s d. Turns z_s into e_s and z_t into d."""
    max_s, max_t = _maximum(z_s), _maximum(z_t)
    z_s.sub_(max_s)
    z_t.sub_(max_t)
    sum_t = _sum(torch.exp(z_t, out=scratch[0]))
    torch.sub(z_s, z_t, out=z_t)
    sum_s = _sum(z_s.exp_())
    return (torch.cat([max_s, max_t, sum_s, sum_t, _sum(torch.mul(z_s, z_t, out=scratch[0]))], 1),)


def forward_kl_sums(z_s: Tensor, z_t: Tensor, scratch: Scratch) -> tuple[Tensor]:
    """Returns `[r, 5]` maxima, Σe_s, Σe_t, Σe_t d. Turns z_s into e_s and z_t into e_t."""
    max_s, max_t = _maximum(z_s), _maximum(z_t)
    z_s.sub_(max_s)
    z_t.sub_(max_t)
    d = torch.sub(z_s, z_t, out=scratch[0])
    sum_s, sum_t = _sum(z_s.exp_()), _sum(z_t.exp_())
    return (torch.cat([max_s, max_t, sum_s, sum_t, _sum(d.mul_(z_t))], 1),)


def jsd_sums(z_s: Tensor, z_t: Tensor, offsets: Tensor, mix: Tensor, scratch: Scratch) -> tuple[Tensor]:
    """Returns `[r, 2]`, this rank's part of KL(p || m) and KL(q || m), m = βq + (1 - β)p.

    Turns z_s into p and z_t into ln(p / m).

    `mix`: `[r, 2]`, 1 - β and β.
    """
    log_p = z_s.sub_(offsets[:, 0:1]).sub_(offsets[:, 2:3])
    log_q = z_t.sub_(offsets[:, 1:2]).sub_(offsets[:, 3:4])
    q = torch.exp(log_q, out=scratch[2])
    log_ratio = log_q.sub_(log_p)
    # ln(m / p) = ln((1 - β) + β q/p), computed from the smaller of q/p and p/q: exact for p = q, and cannot overflow.
    # The large part of ln(m / p) and of ln(q / m) is added last, so that it does not round away the rest.
    weight = torch.where(log_ratio > 0, mix[:, 0:1], mix[:, 1:2], out=scratch[1])
    rest = torch.abs(log_ratio, out=scratch[0]).neg_().expm1_().mul_(weight).log1p_()
    log_q_over_m = torch.clamp(log_ratio, max=0, out=scratch[1]).sub_(rest)
    teacher = _sum(q.mul_(log_q_over_m))
    log_p_over_m = log_ratio.clamp_(min=0).add_(rest).neg_()
    student = _sum(torch.mul(log_p.exp_(), log_p_over_m, out=scratch[1]))
    return (torch.cat([student, teacher], 1),)


def reverse_kl_gradient(z_s: Tensor, z_t: Tensor, offsets: Tensor, rows: Tensor, scratch: Scratch) -> tuple[()]:
    """Writes weight x p (ln p - ln q - KL) to z_s, with `rows` `[r, 2]`: KL, weight."""
    shift = offsets[:, 3:4] - offsets[:, 2:3] - rows[:, :1]
    _multiply(z_s, z_t, shift, rows[:, 1:] * (-offsets[:, 2:3]).exp(), scratch)
    return ()


def forward_kl_gradient(z_s: Tensor, z_t: Tensor, offsets: Tensor, rows: Tensor, scratch: Scratch) -> tuple[()]:
    """Writes weight x (p - q) to z_s, with `rows` `[r, 1]`: weight."""
    first, second = (rows * (-offsets[:, 2:]).exp()).split(1, 1)
    z_s.mul_(first).sub_(torch.mul(z_t, second, out=scratch[0]))
    return ()


def jsd_gradient(z_s: Tensor, z_t: Tensor, offsets: Tensor, mix: Tensor, rows: Tensor, scratch: Scratch) -> tuple[()]:
    """Writes weight x p (ln p - ln m - KL(p || m)) to z_s, with `rows` `[r, 2]`: KL(p || m), weight."""
    _multiply(z_s, z_t, -rows[:, :1], rows[:, 1:], scratch)
    return ()


def scaled_probabilities(z_s: Tensor, rows: Tensor, scratch: Scratch) -> tuple[()]:
    """Turns `z_s` into p x scale, with `rows` `[r, 3]`: maximum, lse, scale."""
    z_s.sub_(rows[:, 0:1]).sub_(rows[:, 1:2]).exp_().mul_(rows[:, 2:3])
    return ()


def _multiply(a: Tensor, b: Tensor, shift: Tensor, scale: Tensor, scratch: Scratch) -> None:
    """Turns `a` into scale x a x (b + shift)."""
    # In scratch rather than in b, which would have to be written back to main memory.
    a.mul_(torch.add(b, shift, out=scratch[0]).mul_(scale))
