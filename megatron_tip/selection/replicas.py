"""The data-parallel replicas that decide a selection together: the only file of this folder that communicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Replicas:
    """The replicas of one data-parallel group; `group=None` is a single replica, never "world"."""

    group: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the elementwise sum over replicas, equal on all of them; overwrites `tensor`. 1 all-reduce."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns `[num_replicas, *tensor.shape]`, equal on all replicas. 1 all-gather."""
        if self.group is None:
            return tensor[None]
        gathered = tensor.new_empty((self.group.size() * tensor.numel(),))
        dist.all_gather_into_tensor(gathered, tensor.reshape(-1), group=self.group)
        return gathered.view(-1, *tensor.shape)
