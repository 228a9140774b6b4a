"""The distributed optimizer's state, gathered over the data-parallel ranks for checkpoints."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_tip.planning.memory_estimate import GATHERED_BYTES

_NAMES = ("param", "exp_avg", "exp_avg_sq")

PIECE_NUMEL = GATHERED_BYTES // 4
"""Values per rank that are gathered at once: a bucket is the whole model, in float32 too large for a full device."""


def mend_gathering(optimizer: DistributedOptimizer) -> None:
    """Makes `optimizer` gather its state with `whole_state`, as "fully_reshardable" checkpoints need.

    Megatron-Core 0.16's own function leaves out the padding between buckets, but looks up every parameter at its place
    with padding. So it saves parts of other parameters under the names of those after the first bucket. There are
    several buckets as soon as pipeline stages share tied embeddings.
    """
    replacement: Any = partial(whole_state, optimizer)
    optimizer.get_parameter_state_dp_zero = replacement


def whole_state(optimizer: DistributedOptimizer, *, empty_data: bool = False, **_: Any) -> dict[Any, Any]:
    """Returns main parameters and moments by buffer and dtype, `[numel]` float32 on the CPU, padded as in the buffer.

    The same on every data-parallel rank. `empty_data`: zeros of these shapes, without a collective. Otherwise 3
    all-gathers per bucket and piece of it over the data-parallel group.
    """
    state: dict[Any, Any] = {}
    for index, ranges_by_dtype in enumerate(optimizer.gbuf_ranges):
        buffer = optimizer.buffers[index]
        ((dtype, bucket_ranges),) = ranges_by_dtype.items()
        whole = {name: torch.zeros(buffer.numel) for name in _NAMES}
        for bucket, ranges in zip(buffer.buckets, bucket_ranges, strict=True):
            if empty_data:
                break
            places = slice(bucket.offset, bucket.offset + bucket.grad_data.numel())
            for name in _NAMES:
                _gather(whole[name][places], optimizer, name, bucket.grad_data.device, ranges["param_map"])
        state[index] = {dtype: whole}
    return state


def _gather(
    target: Tensor,
    optimizer: DistributedOptimizer,
    name: str,
    device: torch.device,
    ranges: dict[torch.nn.Parameter, Any],
) -> None:
    """Fills `target`, on the CPU, with one bucket's complete state `name`, a piece on `device` at a time."""
    group = optimizer.data_parallel_group
    shard = torch.zeros(len(target) // group.size())
    for parameter, by_space in ranges.items():
        place = by_space["gbuf_local"]
        shard[place.start : place.end] = optimizer._get_main_param_and_optimizer_states(parameter)[name].detach()
    shards = target.view(group.size(), -1)
    for whole, own in zip(shards.split(PIECE_NUMEL, dim=1), shard.split(PIECE_NUMEL), strict=True):
        piece = torch.empty(group.size(), len(own), device=device)
        dist.all_gather(list(piece), own.to(device), group=group)
        whole.copy_(piece)
