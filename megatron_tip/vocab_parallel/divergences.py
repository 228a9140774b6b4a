"""One function a divergence: `[c]` values on all ranks, and the gradient with respect to this rank's student logits.

Each takes a chunk's `[c, v]` float32 logits of student and teacher, which it overwrites, and returns a `ChunkDivergence`.
p is the student's distribution, q the teacher's. Values and gradients are of the logits as given (over the temperature).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.vocab_parallel import kernels
from megatron_tip.vocab_parallel.chunks import RowBlocks
from megatron_tip.vocab_parallel.collectives import all_gather, all_reduce_sum
from megatron_tip.vocab_parallel.normalisation import Normaliser
from megatron_tip.vocab_parallel.partition import VocabPartition


@dataclass(frozen=True)
class ChunkDivergence:
    """`values`: `[c]`, equal on all ranks. `gradient(weights)`: `[c, v]`, weights `[c]` x d value / d student logits.

    The gradient is written into the student's logits; take it at most once.
    """

    values: Tensor
    gradient: Callable[[Tensor], Tensor]


def reverse_kl(z_s: Tensor, z_t: Tensor, blocks: RowBlocks, partition: VocabPartition) -> ChunkDivergence:
    """KL(p || q); TIP Eq. 1 and 3, TA-OPD Eq. 6. Gradient p (ln p - ln q - KL). One all-gather."""
    (sums,) = blocks.run(kernels.reverse_kl_sums, z_s, z_t)
    sums = all_gather(sums, partition.group)
    normaliser = Normaliser.of(sums[..., :2], sums[..., 2:4])
    values = normaliser.expectation(0, sums[..., 2], sums[..., 4], normaliser.log_ratio_shift)

    def gradient(weights: Tensor) -> Tensor:
        shift = normaliser.log_ratio_shift[partition.rank] - values
        scale = weights * (-normaliser.lse[partition.rank, :, 0]).exp()
        blocks.run(kernels.product_gradient, z_s, z_t, torch.stack([shift, scale], 1))
        return z_s

    return ChunkDivergence(values, gradient)


def forward_kl(z_s: Tensor, z_t: Tensor, blocks: RowBlocks, partition: VocabPartition) -> ChunkDivergence:
    """KL(q || p). Gradient p - q. One all-gather."""
    (sums,) = blocks.run(kernels.forward_kl_sums, z_s, z_t)
    sums = all_gather(sums, partition.group)
    normaliser = Normaliser.of(sums[..., :2], sums[..., 2:4])
    values = -normaliser.expectation(1, sums[..., 3], sums[..., 4], normaliser.log_ratio_shift)

    def gradient(weights: Tensor) -> Tensor:
        rows = weights.unsqueeze(1) * (-normaliser.lse[partition.rank]).exp()
        blocks.run(kernels.difference_gradient, z_s, z_t, rows)
        return z_s

    return ChunkDivergence(values, gradient)


def jsd(z_s: Tensor, z_t: Tensor, blocks: RowBlocks, partition: VocabPartition, *, beta: float) -> ChunkDivergence:
    """β KL(q || m) + (1 - β) KL(p || m), m = βq + (1 - β)p, 0 < β < 1. One all-gather, one all-reduce.

    Gradient (1 - β) p (ln p - ln m - KL(p || m)).
    """
    (sums,) = blocks.run(kernels.partition_sums, z_s, z_t)
    sums = all_gather(sums, partition.group)
    return jsd_of_normalised(z_s, z_t, Normaliser.of(sums[..., :2], sums[..., 2:]), blocks, partition, beta=beta)


def jsd_of_normalised(
    z_s: Tensor, z_t: Tensor, normaliser: Normaliser, blocks: RowBlocks, partition: VocabPartition, *, beta: float
) -> ChunkDivergence:
    """As `jsd`, for logits whose normaliser is known. One all-reduce."""
    offsets = torch.cat([normaliser.maxima[partition.rank], normaliser.lse[partition.rank]], 1)
    log_mix = offsets.new_tensor([math.log1p(-beta), math.log(beta)]).expand(len(z_s), 2)
    (parts,) = blocks.run(kernels.jsd_sums, z_s, z_t, offsets, log_mix)
    student, teacher = all_reduce_sum(parts, partition.group).unbind(1)

    def gradient(weights: Tensor) -> Tensor:
        blocks.run(kernels.product_gradient, z_s, z_t, torch.stack([-student, (1 - beta) * weights], 1))
        return z_s

    return ChunkDivergence(beta * teacher + (1 - beta) * student, gradient)


def sampled_token(
    z_s: Tensor, z_t: Tensor, labels: Tensor, blocks: RowBlocks, partition: VocabPartition
) -> ChunkDivergence:
    """ln p(y) - ln q(y) of the label y; TA-OPD, after Eq. 6. One all-gather.

    Gradient (ln p(y) - ln q(y)) d ln p(y): over y drawn from p its mean is the gradient of KL(p || q). Differentiating the
    value itself would give d ln p(y), whose mean is zero.
    """
    own_s, own_t = (partition.owned(z, labels.unsqueeze(1))[0] for z in (z_s, z_t))
    (sums,) = blocks.run(kernels.partition_sums, z_s, z_t)
    sums = all_gather(torch.cat([sums, own_s, own_t], 1), partition.group)
    normaliser = Normaliser.of(sums[..., :2], sums[..., 2:4])
    on_label = sums[..., 4:].sum(0)
    log_p, log_q = (normaliser.logprobs(on_label[:, model, None], model).squeeze(1) for model in (0, 1))
    values = log_p - log_q

    def gradient(weights: Tensor) -> Tensor:
        scale = (weights * values).unsqueeze(1)
        offsets = torch.cat(
            [normaliser.maxima[partition.rank, :, :1], normaliser.lse[partition.rank, :, :1], -scale], 1
        )
        blocks.run(kernels.scaled_probabilities, z_s, offsets)
        partition.add_owned(z_s, labels.unsqueeze(1), scale)
        return z_s

    return ChunkDivergence(values, gradient)
