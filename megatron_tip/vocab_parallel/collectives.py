"""All communication of this package between ranks. `group=None` means "not sharded": no communication."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError, PeerError


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sums `values` over `group` in place and returns them. One all-reduce."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def all_gather(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Returns `values` of every rank of `group`, in rank order: `[tp, *values.shape]`. One all-gather."""
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
    """Raises on every rank of `group` if any rank has a `problem`, or if ranks differ in one of the named `sizes`.

    One all-gather of 8 bytes, plus 8 per size. Without it, ranks would wait for one that rejects its own values.

    Raises:
        error: this rank has a problem.
        PeerError: another rank has one.
        InputError: sizes differ.
    """
    facts = torch.tensor([problem is not None, *sizes.values()], device=device)
    stopped, *columns = all_gather(facts, group).unbind(1)
    if problem is not None:
        raise error(f"{where}: {problem}")
    if stopped.any():
        ranks = stopped.nonzero().flatten().tolist()
        raise PeerError(f"{where}: ranks {ranks} of tp_group reject their inputs; see their own messages.")
    for name, values in zip(sizes, columns, strict=True):
        if (values != values[0]).any():
            raise InputError(
                f"{where}: expected the same number of {name} on all ranks of tp_group, got {values.tolist()}; pass "
                "the same hidden states on all of them (gather sequence-parallel ones) and shards of equal size."
            )
