"""The only places where this package talks to other ranks. `group=None` means "not sharded": nobody to talk to."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError, PeerError


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """`values` summed over `group`, in place. One all-reduce."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def all_gather(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """`[tp, *values.shape]`: `values` of every rank of `group`, in rank order. One all-gather."""
    if group is None:
        return values.unsqueeze(0)
    gathered = values.new_empty(group.size(), *values.shape)
    dist.all_gather(list(gathered.unbind(0)), values.contiguous(), group=group)
    return gathered


def agree(
    where: str,
    problem: str | None,
    sizes: dict[str, int],
    device: torch.device,
    group: ProcessGroup | None,
    *,
    error: type[InputError] = InputError,
) -> None:
    """Raises on every rank of `group` if any of them has a `problem`, or if they differ in one of the named `sizes`.

    `error` where the problem is, PeerError on the others.

    One all-gather of 8 bytes, and 8 a size. Without it a rank that stops over its own values leaves the others waiting.
    """
    facts = torch.tensor([problem is not None, *sizes.values()], device=device)
    stopped, *columns = all_gather(facts, group).unbind(1)
    if problem is not None:
        raise error(f"{where}: {problem}")
    if stopped.any():
        ranks = stopped.nonzero().flatten().tolist()
        raise PeerError(f"{where}: ranks {ranks} of tp_group reject their inputs; their own messages say why.")
    for name, values in zip(sizes, columns, strict=True):
        if (values != values[0]).any():
            raise InputError(
                f"{where}: expected one number of {name} on all ranks of tp_group, got {values.tolist()}; hidden "
                "states are the same on all of them, gathered if they were sequence-parallel, and shards are equal."
            )
