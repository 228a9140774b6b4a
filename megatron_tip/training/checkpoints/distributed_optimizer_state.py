"""The distributed optimizer's state: gathered over the data-parallel ranks to be saved, read by each rank in parts."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
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

    The same on every data-parallel rank. `empty_data`: only the shapes, on the meta device, without a collective.
    Otherwise 3 all-gathers per bucket and piece of it over the data-parallel group.
    """
    state: dict[Any, Any] = {}
    for index, ranges_by_dtype in enumerate(optimizer.gbuf_ranges):
        buffer = optimizer.buffers[index]
        ((dtype, bucket_ranges),) = ranges_by_dtype.items()
        whole = {name: torch.zeros(buffer.numel, device="meta" if empty_data else "cpu") for name in _NAMES}
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


def own_rows(optimizer: DistributedOptimizer, shapes: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Returns what to read of a checkpoint for this rank's part of the optimizer: lists of ShardedTensor.

    Megatron's own way is to read every tensor of the model part on each data-parallel rank and to drop most of it. This
    rank holds a range of the flat buffer, so it needs whole parameters, and of the first and the last one some rows.

    Args:
        shapes: "param_state" of the optimizer's sharded state for loading, with `whole_state` in effect.
    """
    return {
        place: {name: [rows for rows, _ in _rows_of(tensor, part)] for name, tensor in shapes[place].items()}
        for place, _, part in _own_parameters(optimizer)
    }


@torch.no_grad()
def load_own_rows(
    optimizer: DistributedOptimizer, shapes: dict[int, dict[str, Any]], loaded: dict[int, dict[str, Any]]
) -> None:
    """Sets this rank's part of the optimizer to what was read for `own_rows`.

    The step counts of torch's AdamW are left as they are: Megatron would look for them beside the moments.
    """
    counts = {parameter: one.pop("step") for parameter, one in optimizer.optimizer.state.items() if "step" in one}
    for place, parameter, part in _own_parameters(optimizer):
        state = {}
        for name, tensor in shapes[place].items():
            wanted = [elements for _, elements in _rows_of(tensor, part)]
            read = zip(loaded[place][name], wanted, strict=True)
            state[name] = torch.cat([rows.flatten()[elements] for rows, elements in read])
        optimizer._set_main_param_and_optimizer_states(parameter, state)
    for parameter, count in counts.items():
        optimizer.optimizer.state[parameter]["step"] = count


def _own_parameters(optimizer: DistributedOptimizer) -> Iterator[tuple[int, torch.nn.Parameter, slice]]:
    """Yields the place in "param_state", the parameter and this rank's range of its elements."""
    place = 0
    for index, ranges_by_dtype in enumerate(optimizer.gbuf_ranges):
        (bucket_ranges,) = ranges_by_dtype.values()
        own = {parameter: spaces for ranges in bucket_ranges for parameter, spaces in ranges["param_map"].items()}
        for parameter in optimizer.buffers[index].param_index_map:
            if parameter in own:
                yield place, parameter, slice(own[parameter]["param"].start, own[parameter]["param"].end)
            place += 1


def _rows_of(tensor: ShardedTensor | ShardedTensorFactory, part: slice) -> Iterator[tuple[ShardedTensor, slice]]:
    """Yields the rows that contain the elements `part` of a flattened tensor, and the elements' places in these rows.

    A factory's tensor, such as the two halves of SwiGLU's first layer, comes in pieces.
    """
    pieces: Any = tensor.build() if isinstance(tensor, ShardedTensorFactory) else [tensor]
    ends = list(accumulate(prod(piece.local_shape) for piece in pieces))
    for piece, end in zip(pieces, ends, strict=True):
        begin = end - prod(piece.local_shape)
        start, stop = max(part.start, begin) - begin, min(part.stop, end) - begin
        if start < stop:
            width = prod(piece.local_shape[1:])
            first, last = start // width, -(-stop // width)
            yield _narrowed(piece, first, last - first), slice(start - first * width, stop - first * width)


def _narrowed(tensor: ShardedTensor, first: int, num_rows: int) -> ShardedTensor:
    """Returns `num_rows` rows of a sharded tensor, with room for them on the CPU; prepended axes are now of size 1."""
    prepended = tensor.prepend_axis_num
    shape = (*[1] * prepended, num_rows, *tensor.local_shape[1:])
    offset = list(tensor.global_offset)
    offset[prepended] += first
    return replace(
        tensor,
        data=torch.empty(shape, dtype=tensor.dtype),
        local_shape=shape,
        global_offset=tuple(offset),
        axis_fragmentations=None,  # not a regular grid
        prepend_axis_num=0,
    )
