"""Top-K sets that are the same for the same logits on every layout: ties go to the lower id."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_tip.vocab_parallel.collectives import all_gather
from megatron_tip.vocab_parallel.partition import VocabPartition

GROUP_SIZE = 64
"""Columns per group; the first round of a top-K searches only the groups' maxima."""


def group_maxima(logits: Tensor) -> Tensor:
    """Returns maxima over 64 neighbouring columns of `[r, v]` `logits`: `[r, ceil(v / 64)]`, for `local_topk`."""
    num_whole, rest = logits.shape[1] // GROUP_SIZE, logits.shape[1] % GROUP_SIZE  # torch.compile knows no divmod
    maxima = logits[:, : num_whole * GROUP_SIZE].view(len(logits), num_whole, GROUP_SIZE).amax(-1)
    return torch.cat([maxima, logits[:, -rest:].amax(-1, keepdim=True)], 1) if rest else maxima


def local_topk(logits: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the `k` largest of `[c, v]` `logits`, in float32, and their columns, descending, ties by lower column.

    `maxima`: the logits' `group_maxima`. Only the `k` groups with the largest maxima (the first of equal ones) are
    searched, as they contain the result. If `v < k`, the rest is -inf at columns from `v` up.
    """
    c, v = logits.shape
    num_groups = maxima.shape[1]
    if num_groups < k:
        maxima = pad(maxima, (0, k - num_groups), value=float("-inf"))
    groups = _ordered_topk_indices(maxima, k).sort(-1).values  # back in column order, which breaks ties
    columns = torch.add(groups.unsqueeze(-1) * GROUP_SIZE, torch.arange(GROUP_SIZE, device=logits.device)).flatten(1)
    if v == 0:
        return maxima.new_full((c, k), float("-inf")), columns[:, :k]
    if num_groups >= k and v % GROUP_SIZE == 0:
        candidates = logits.gather(1, columns).float()
    else:
        candidates = logits.gather(1, columns.clamp(max=v - 1)).float().masked_fill_(columns >= v, float("-inf"))
    places = _ordered_topk_indices(candidates, k)
    return candidates.gather(1, places), columns.gather(1, places)


def exchange_topk(
    models: Sequence[Tensor], maxima: Sequence[Tensor], sums: Tensor, k: int, partition: VocabPartition
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Returns every rank's `[tp, c, ...]` sums, and each model's global top-K: logits and ids `[c, k]`.

    `models`: `[c, v]` local logits. `maxima`: their group maxima, float32. `sums`: `[c, ...]` float32, gathered in the
    same message. One all-gather of 8 bytes x k per row and model, plus the sums.
    """
    packed = [sums.view(torch.int32)]  # floats are sent as their bits, so that logits and ids share one message
    for logits, groups in zip(models, maxima, strict=True):
        values, columns = local_topk(logits, groups, k)
        packed += [values.view(torch.int32), (columns + partition.vocab_start_index).int()]
    gathered = all_gather(torch.cat(packed, 1), partition.group)
    sums, *tops = (part.contiguous() for part in gathered.split([part.shape[1] for part in packed], -1))
    pairs = zip(tops[0::2], tops[1::2], strict=True)
    return sums.view(torch.float32), [_merged(values.view(torch.float32), ids.long(), k) for values, ids in pairs]


def _merged(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the `k` largest of `[tp, c, k]` top logits and their ids: `[c, k]`, descending, ties by lower id."""
    # Ranks, and ties within each rank, are in id order, so breaking ties by place is the same as by id.
    values, ids = values.transpose(0, 1).flatten(1), ids.transpose(0, 1).flatten(1)
    places = _ordered_topk_indices(values, k)
    return values.gather(1, places), ids.gather(1, places)


def _ordered_topk_indices(values: Tensor, k: int) -> Tensor:
    """Returns `[c, k]` indices of the `k` largest of `[c, m]` float32 `values`, descending, ties by lower index.

    `torch.topk` does not define the order of ties, so it gets unique int64 keys: the high bits are the value's bits
    mapped to a sortable integer, the low bits are the reversed index.
    """
    m = values.shape[1]
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    flip = (bits >> 31).bitwise_and_(0x7FFFFFFF)  # negative floats sort backwards
    keys = bits.bitwise_xor_(flip).long().bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(m - 1, -1, -1, device=values.device))
    return keys.topk(k).values.bitwise_and_(0xFFFFFFFF).neg_().add_(m - 1)
