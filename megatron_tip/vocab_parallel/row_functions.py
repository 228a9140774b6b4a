"""One function a quantity: `[c]` values on all ranks, and the gradient with respect to this rank's logits.

Each takes a chunk's `[c, v]` float32 logits over the ids that this rank owns, overwrites them, and returns `RowValues`.
p is the student's distribution (`z_s`), q the teacher's (`z_t`); where there is only one, it is p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tip.vocab_parallel import kernels
from megatron_tip.vocab_parallel.chunks import RowBlocks
from megatron_tip.vocab_parallel.collectives import all_gather, all_reduce_sum
from megatron_tip.vocab_parallel.normalisation import Normaliser
from megatron_tip.vocab_parallel.partition import VocabPartition


@dataclass(frozen=True)
class RowValues:
    """`values`: `[c]`, equal on all ranks. `gradient(weights)`: `[c, v]`, `[c]` weights x d value / d logits of p.

    The gradient is written into the memory of the logits; take it at most once.
    """

    values: Tensor
    gradient: Callable[[Tensor], Tensor]


def reverse_kl(z_s: Tensor, z_t: Tensor, blocks: RowBlocks, partition: VocabPartition) -> RowValues:
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

    return RowValues(values, gradient)


def forward_kl(z_s: Tensor, z_t: Tensor, blocks: RowBlocks, partition: VocabPartition) -> RowValues:
    """KL(q || p). Gradient p - q. One all-gather."""
    (sums,) = blocks.run(kernels.forward_kl_sums, z_s, z_t)
    sums = all_gather(sums, partition.group)
    normaliser = Normaliser.of(sums[..., :2], sums[..., 2:4])
    values = -normaliser.expectation(1, sums[..., 3], sums[..., 4], normaliser.log_ratio_shift)

    def gradient(weights: Tensor) -> Tensor:
        rows = weights.unsqueeze(1) * (-normaliser.lse[partition.rank]).exp()
        blocks.run(kernels.difference_gradient, z_s, z_t, rows)
        return z_s

    return RowValues(values, gradient)


def jsd(z_s: Tensor, z_t: Tensor, blocks: RowBlocks, partition: VocabPartition, *, beta: float) -> RowValues:
    """β KL(q || m) + (1 - β) KL(p || m), m = βq + (1 - β)p, 0 < β < 1. One all-gather, one all-reduce.

    Gradient (1 - β) p (ln p - ln m - KL(p || m)).
    """
    (sums,) = blocks.run(kernels.partition_sums, z_s, z_t)
    sums = all_gather(sums, partition.group)
    return jsd_of_normalised(z_s, z_t, Normaliser.of(sums[..., :2], sums[..., 2:]), blocks, partition, beta=beta)


def jsd_of_normalised(
    z_s: Tensor, z_t: Tensor, normaliser: Normaliser, blocks: RowBlocks, partition: VocabPartition, *, beta: float
) -> RowValues:
    """As `jsd`, for logits whose normaliser is known. One all-reduce."""
    offsets = torch.cat([normaliser.maxima[partition.rank], normaliser.lse[partition.rank]], 1)
    mix = offsets.new_tensor([1 - beta, beta]).expand(len(z_s), 2)
    (parts,) = blocks.run(kernels.jsd_sums, z_s, z_t, offsets, mix)
    student, teacher = all_reduce_sum(parts, partition.group).unbind(1)

    def gradient(weights: Tensor) -> Tensor:
        blocks.run(kernels.product_gradient, z_s, z_t, torch.stack([-student, (1 - beta) * weights], 1))
        return z_s

    return RowValues(beta * teacher + (1 - beta) * student, gradient)


def sampled_token(z_s: Tensor, z_t: Tensor, labels: Tensor, blocks: RowBlocks, partition: VocabPartition) -> RowValues:
    """ln p(y) - ln q(y) of the label y; TA-OPD, after Eq. 6. One all-gather.

    Gradient (ln p(y) - ln q(y)) d ln p(y): over y drawn from p its mean is the gradient of KL(p || q). Differentiating
    the value itself would give d ln p(y), whose mean is zero.
    """
    student, teacher, normaliser = _logprobs_of((z_s, z_t), labels, blocks, partition)
    values = student - teacher
    return RowValues(
        values, lambda weights: _logprob_gradient(weights * values, z_s, labels, normaliser, blocks, partition)
    )


def logprobs(z: Tensor, labels: Tensor, blocks: RowBlocks, partition: VocabPartition) -> RowValues:
    """ln p(y) of the label y. Gradient (1 at y) - p. One all-gather."""
    values, normaliser = _logprobs_of((z,), labels, blocks, partition)
    return RowValues(values, lambda weights: _logprob_gradient(weights, z, labels, normaliser, blocks, partition))


def entropy(z: Tensor, spare: Tensor, blocks: RowBlocks, partition: VocabPartition) -> RowValues:
    """H(p) in nats; TIP Eq. 2 before its division by ln |V|. Gradient -p (ln p + H). One all-gather.

    `spare`: memory of z's shape.
    """
    (sums,) = blocks.run(kernels.entropy_sums, z, spare)
    sums = all_gather(sums, partition.group)
    normaliser = Normaliser.of(sums[..., :1], sums[..., 1:2])
    values = -normaliser.expectation(0, sums[..., 1], sums[..., 2], -normaliser.lse[..., 0])

    def gradient(weights: Tensor) -> Tensor:
        lse = normaliser.lse[partition.rank, :, 0]
        blocks.run(kernels.product_gradient, z, spare, torch.stack([values - lse, -weights * (-lse).exp()], 1))
        return z

    return RowValues(values, gradient)


def _logprobs_of(
    models: tuple[Tensor, ...], labels: Tensor, blocks: RowBlocks, partition: VocabPartition
) -> tuple[Any, ...]:
    """`[c]` logprobs of the labels under each model, and then their normaliser. One all-gather."""
    m = len(models)
    owned = [partition.owned(z, labels.unsqueeze(1))[0] for z in models]
    (sums,) = blocks.run(kernels.partition_sums, *models)
    sums = all_gather(torch.cat([sums, *owned], 1), partition.group)
    normaliser = Normaliser.of(sums[..., :m], sums[..., m : 2 * m])
    on_label = sums[..., 2 * m :].sum(0)  # one rank owns the label, the others hold zero
    return *(normaliser.logprobs(on_label[:, i, None], i).squeeze(1) for i in range(m)), normaliser


def _logprob_gradient(
    weights: Tensor, z: Tensor, labels: Tensor, normaliser: Normaliser, blocks: RowBlocks, partition: VocabPartition
) -> Tensor:
    maximum, lse = normaliser.maxima[partition.rank, :, 0], normaliser.lse[partition.rank, :, 0]
    blocks.run(kernels.scaled_probabilities, z, torch.stack([maximum, lse, -weights], 1))
    partition.add_owned(z, labels.unsqueeze(1), weights.unsqueeze(1))
    return z
