"""The only two ways in which this package talks to other ranks; without a group both are the identity."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """`values` summed over `group`, in place. One all-reduce."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def all_gather(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """`[tp, *values.shape]`: `values` of every rank of `group`, in rank order. One all-gather."""
    if group is None or group.size() == 1:
        return values.unsqueeze(0)
    gathered = values.new_empty(group.size(), *values.shape)
    dist.all_gather(list(gathered.unbind(0)), values.contiguous(), group=group)
    return gathered
