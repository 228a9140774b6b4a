"""The parts of a micro-batch that the ranks of a context-parallel group hold.

Megatron's load-balanced cut: each sequence has 2 cp equal chunks, and rank r holds chunks r and 2 cp - 1 - r. A late
chunk attends to more tokens than an early one; together, each rank's two cost the same. Shape letters as in `records`.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.records import MicroBatch


def owner_of_chunk(chunk: Tensor, cp_size: int) -> Tensor:
    """Returns which context-parallel rank holds each chunk, counted from 0 within its sequence."""
    return torch.minimum(chunk, 2 * cp_size - 1 - chunk)


def token_owners(lengths: Sequence[int], cp_size: int) -> Tensor:
    """Returns `[s]` int64 on the CPU: the context-parallel rank of each token of packed sequences of `lengths`.

    A rank holds its tokens in their order in the micro-batch.
    """
    if cp_size == 1:
        return torch.zeros(sum(lengths), dtype=torch.int64)
    misfits = [length for length in lengths if length % (2 * cp_size)]
    assert not misfits, f"expected sequences of a multiple of {2 * cp_size} tokens, got {misfits}: pad them first"
    chunks = torch.arange(2 * cp_size).repeat(len(lengths))
    sizes = torch.tensor(lengths).repeat_interleave(2 * cp_size) // (2 * cp_size)
    return owner_of_chunk(chunks, cp_size).repeat_interleave(sizes)


def context_part(micro_batch: MicroBatch, *, cp_size: int, cp_rank: int) -> MicroBatch:
    """Returns the part of `micro_batch` that a context-parallel rank holds, `[s / cp]`; the whole with `cp_size` 1.

    `lengths` stay those of the whole sequences. Labels were shifted before the cut, so that the last label of a chunk
    is the first token of the next.
    """
    if cp_size == 1:
        return micro_batch
    own = (token_owners(micro_batch.lengths, cp_size) == cp_rank).nonzero()[:, 0].to(micro_batch.input_ids.device)
    names = [field.name for field in fields(MicroBatch) if field.name != "lengths"]
    return MicroBatch(micro_batch.lengths, **{name: getattr(micro_batch, name)[own] for name in names})


def gathered_rows(values: Tensor, owners: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
    """Returns the values of all rows of a replica from those of this rank's part: `[n, ...]`, equal on all cp ranks.

    Args:
        values: `[own rows, ...]`, in the order of the rows.
        owners: `[n]` int64, on the same device: the context-parallel rank that holds each row of the replica.

    Collectives: 1 all-gather over `cp_group`, padded to the rank with the most rows; none if it is this rank alone.
    """
    if cp_group.size() == 1:
        return values
    counts = torch.bincount(owners, minlength=cp_group.size())
    most = int(counts.max())
    padded = values.new_zeros(most, *values.shape[1:])
    padded[: len(values)] = values
    parts = values.new_empty(cp_group.size() * most, *values.shape[1:])
    dist.all_gather_into_tensor(parts, padded, group=cp_group)
    order = owners.argsort(stable=True)
    within = torch.empty_like(owners)
    within[order] = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners[order]]
    return parts[owners * most + within]
