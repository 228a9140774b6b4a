"""Megatron's dispatch of tokens to experts over gloo; imported only on machines without a CUDA device.

Two things are missing there. Megatron turns the counts of tokens per rank into what collectives take only as it copies
them from a GPU. And gloo's all-gather and reduce-scatter refuse parts of different sizes, which NCCL takes; its
all-to-all does the same work.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor


def install() -> None:
    """Replaces three functions of Megatron for the rest of the process. Further calls do nothing.

    `gather` and `reduce_scatter` are looked up at each call: a simulated GPU has others.
    """
    if token_dispatcher.maybe_move_tensor_to_cpu is _on_host:
        return
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host
    mappings._gather_along_first_dim = _of_any_sizes(mappings._gather_along_first_dim, lambda *parts: gather(*parts))
    mappings._reduce_scatter_along_first_dim = _of_any_sizes(
        mappings._reduce_scatter_along_first_dim, lambda *parts: reduce_scatter(*parts)
    )


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Returns counts as Megatron's function does for those on a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _of_any_sizes(
    equal: Callable[..., Tensor], unequal: Callable[[Tensor, dist.ProcessGroup, Sequence[int]], Tensor]
) -> Callable[..., Tensor]:
    def choose(
        input_: Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return equal(input_, group, None, use_global_buffer)
        return unequal(input_, group, sizes)

    return choose


def gather(part: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """Returns all ranks' parts, one after the other; rank r's has `sizes[r]` rows. One all-to-all."""
    gathered = part.new_empty(sum(sizes), *part.shape[1:])
    copies = torch.cat([part] * group.size())
    dist.all_to_all_single(gathered, copies, list(sizes), [len(part)] * group.size(), group=group)
    return gathered


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """Returns the sum of all ranks' parts for this rank; the part for rank r has `sizes[r]` rows. One all-to-all."""
    own = sizes[group.rank()]
    received = parts.new_empty(group.size() * own, *parts.shape[1:])
    dist.all_to_all_single(received, parts.contiguous(), [own] * group.size(), list(sizes), group=group)
    return received.view(group.size(), own, *parts.shape[1:]).sum(0)
