"""The data-parallel replicas that select together. Only this file of the folder communicates."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Replicas:
    """The replicas of one data-parallel group; `group=None` means a single replica, never "world"."""

    group: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the elementwise sum over replicas, the same on all of them; overwrites `tensor`. 1 all-reduce."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns `[num_replicas, *tensor.shape]`, the same on all replicas. 1 all-gather."""
        if self.group is None:
            return tensor[None]
        gathered = tensor.new_empty((self.group.size() * tensor.numel(),))
        dist.all_gather_into_tensor(gathered, tensor.reshape(-1), group=self.group)
        return gathered.view(-1, *tensor.shape)
