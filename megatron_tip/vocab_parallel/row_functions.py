"""Divergences per row: `[c]` values on all ranks, and the gradient with respect to this rank's logits.

Each function overwrites the chunk's logits and returns `RowValues`. p is the student's distribution, q the teacher's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.vocab_parallel import kernels
from megatron_tip.vocab_parallel.chunks import Chunk
from megatron_tip.vocab_parallel.collectives import all_gather, all_reduce_sum
from megatron_tip.vocab_parallel.softmax_normaliser import SoftmaxNormaliser


@dataclass(frozen=True)
class RowValues:
    """The values of a chunk's rows and their gradient.

    `values`: `[c]`, equal on all ranks. `gradient(weights)`: `[c, v]`, `[c]` weights x d value / d logits of p. It
    overwrites the logits; call it at most once.
    """

    values: Tensor
    gradient: Callable[[Tensor], Tensor]


def reverse_kl(chunk: Chunk) -> RowValues:
    """Returns KL(p || q); TIP Eq. 1 and 3, TA-OPD Eq. 6. Gradient p (ln p - ln q - KL). One all-gather."""
    (z_s, z_t), rank = chunk.logits, chunk.partition.rank
    (sums,) = chunk.blocks.run(kernels.reverse_kl_sums, z_s, z_t)
    sums = all_gather(sums, chunk.partition.group)
    normaliser = SoftmaxNormaliser.of(sums[..., :2], sums[..., 2:4])
    values = normaliser.expectation(0, sums[..., 2], sums[..., 4], normaliser.log_ratio_shift)

    def gradient(weights: Tensor) -> Tensor:
        rows = torch.stack([values, weights], 1)
        chunk.blocks.run(kernels.reverse_kl_gradient, z_s, z_t, normaliser.offsets(rank), rows)
        return z_s

    return RowValues(values, gradient)


def forward_kl(chunk: Chunk) -> RowValues:
    """Returns KL(q || p). Gradient p - q. One all-gather."""
    z_s, z_t = chunk.logits
    (sums,) = chunk.blocks.run(kernels.forward_kl_sums, z_s, z_t)
    sums = all_gather(sums, chunk.partition.group)
    normaliser = SoftmaxNormaliser.of(sums[..., :2], sums[..., 2:4])
    values = -normaliser.expectation(1, sums[..., 3], sums[..., 4], normaliser.log_ratio_shift)

    def gradient(weights: Tensor) -> Tensor:
        offsets = normaliser.offsets(chunk.partition.rank)
        chunk.blocks.run(kernels.forward_kl_gradient, z_s, z_t, offsets, weights.unsqueeze(1))
        return z_s

    return RowValues(values, gradient)


def jsd(chunk: Chunk, *, beta: float) -> RowValues:
    """Returns β KL(q || m) + (1 - β) KL(p || m), m = βq + (1 - β)p, 0 < β < 1. One all-gather, one all-reduce.

    Gradient (1 - β) p (ln p - ln m - KL(p || m)).
    """
    (sums,) = chunk.blocks.run(kernels.partition_sums, *chunk.logits)
    sums = all_gather(sums, chunk.partition.group)
    return jsd_of_normalised(chunk, SoftmaxNormaliser.of(sums[..., :2], sums[..., 2:]), beta=beta)


def jsd_of_normalised(chunk: Chunk, normaliser: SoftmaxNormaliser, *, beta: float) -> RowValues:
    """Returns the same as `jsd` for logits whose normaliser is known. One all-reduce."""
    (z_s, z_t), rank = chunk.logits, chunk.partition.rank
    offsets = normaliser.offsets(rank)
    mix = torch.stack([offsets.new_full((len(z_s),), share) for share in (1 - beta, beta)], 1)
    (parts,) = chunk.blocks.run(kernels.jsd_sums, z_s, z_t, offsets, mix)
    student, teacher = all_reduce_sum(parts, chunk.partition.group).unbind(1)

    def gradient(weights: Tensor) -> Tensor:
        rows = torch.stack([student, (1 - beta) * weights], 1)
        chunk.blocks.run(kernels.jsd_gradient, z_s, z_t, offsets, mix, rows)
        return z_s

    return RowValues(beta * teacher + (1 - beta) * student, gradient)


def sampled_token(chunk: Chunk, labels: Tensor, teacher_logprobs: Tensor | None = None) -> RowValues:
    """Returns ln p(y) - ln q(y) of the `[c]` labels y; TA-OPD, after Eq. 6. One all-gather.

    `teacher_logprobs`: `[c]` ln q(y), if the chunk has only the student's logits.

    Gradient (ln p(y) - ln q(y)) d ln p(y): for y drawn from p, its mean is the gradient of KL(p || q). Differentiating
    the value itself would give d ln p(y), whose mean is zero.
    """
    m, z_s, partition = len(chunk.logits), chunk.logits[0], chunk.partition
    owned = [partition.owned(z, labels.unsqueeze(1))[0] for z in chunk.logits]
    (sums,) = chunk.blocks.run(kernels.partition_sums, *chunk.logits)
    sums = all_gather(torch.cat([sums, *owned], 1), partition.group)
    normaliser = SoftmaxNormaliser.of(sums[..., :m], sums[..., m : 2 * m])
    on_label = sums[..., 2 * m :].sum(0)  # one rank owns the label, the others hold zero
    logprobs = on_label - normaliser.top - normaliser.log_sum
    values = logprobs[:, 0] - (logprobs[:, 1] if teacher_logprobs is None else teacher_logprobs)

    def gradient(weights: Tensor) -> Tensor:
        scale, label = weights * values, labels.unsqueeze(1)
        maximum, lse = normaliser.maxima[partition.rank, :, 0], normaliser.lse[partition.rank, :, 0]
        # The label's own gradient, scale (1 - p(y)), would be lost in the rounding of bfloat16 logits: it comes last.
        partition.hide(z_s, label)
        chunk.blocks.run(kernels.scaled_probabilities, z_s, torch.stack([maximum, lse, -scale], 1))
        partition.add_owned(z_s, label, (-scale * logprobs[:, 0].expm1()).unsqueeze(1))
        return z_s

    return RowValues(values, gradient)
