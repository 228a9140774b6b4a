"""Top-K sets that are the same on every layout: ties go to the lower id."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_tip.vocab_parallel.collectives import all_gather
from megatron_tip.vocab_parallel.partition import VocabPartition

# Columns whose maximum stands for all of them in the first round of a top-K.
_BLOCK_SIZE = 64


def local_topk(logits: Tensor, support_size: int) -> tuple[Tensor, Tensor]:
    """The `support_size` largest of `[c, v]` float32 logits and their columns, descending, ties by lower column.

    Where `v < support_size`, the rest is -inf with columns at or above `v`. Two rounds: the winners lie in the blocks with
    the largest maxima, so only those are searched.
    """
    missing = max(-(-logits.shape[1] // _BLOCK_SIZE), support_size) * _BLOCK_SIZE - logits.shape[1]
    if missing % _BLOCK_SIZE or missing:
        logits = pad(logits, (0, missing), value=float("-inf"))
    blocks = logits.unflatten(1, (-1, _BLOCK_SIZE))
    _, block_ids = ordered_topk(blocks.amax(-1), support_size)
    block_ids = block_ids.sort(-1).values  # candidates in the order of their columns, which breaks ties
    candidates = blocks.gather(1, block_ids.unsqueeze(-1).expand(-1, -1, _BLOCK_SIZE)).flatten(1)
    values, places = ordered_topk(candidates, support_size)
    return values, block_ids.gather(1, places // _BLOCK_SIZE) * _BLOCK_SIZE + places % _BLOCK_SIZE


def ordered_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of `[c, m]` float32 `values` and their indices, descending, ties by lower index.

    `torch.topk` leaves ties open, so it is given keys without ties: the value's bits, made to sort as integers, above
    the index counted down.
    """
    m = values.shape[-1]
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered_bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered_bits.long() << 32) | torch.arange(m - 1, -1, -1, device=values.device)
    indices = (m - 1) - (keys.topk(k).values & 0xFFFFFFFF)
    return values.gather(-1, indices), indices


def global_topk(models: list[Tensor], support_size: int, partition: VocabPartition) -> list[tuple[Tensor, Tensor]]:
    """For each model's local `[c, v]` logits: the top-K logits and token ids `[c, K]` of the whole vocabulary.

    Equal on all ranks of the partition's group. One all-gather for all models, of 8 bytes x K a row and model.
    """
    packed = []
    for logits in models:
        values, columns = local_topk(logits, support_size)
        packed += [values.view(torch.int32), (columns + partition.vocab_start_index).int()]
    gathered = all_gather(torch.stack(packed, 1), partition.group)  # [tp, c, 2 x models, K], bits of floats as integers
    candidates = gathered.permute(2, 1, 0, 3).flatten(2)  # rank order is id order, so ties still go to the lower id
    result = []
    for values, ids in zip(candidates[0::2], candidates[1::2], strict=True):
        top, places = ordered_topk(values.contiguous().view(torch.float32), support_size)
        result.append((top, ids.gather(1, places).long()))
    return result
