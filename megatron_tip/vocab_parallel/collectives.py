"""All communication of this package between ranks. `group=None` means "not sharded": no communication."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError, PeerError

_REMEDY = "pass the same hidden states on all of them (gather sequence-parallel ones) and shards of equal size"
_REMEDIES = {
    "rows per chunk": "set the same loss.chunk_rows on all of them; the default is another on a GPU of other memory"
}


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


def agree(where: str, faults: Tensor, sizes: dict[str, int], group: ProcessGroup | None) -> int:
    """Returns this rank's `faults`, an int64 scalar on the device, 0 for none; the caller then raises its own error.

    One all-gather of 8 bytes, plus 8 per size. Without it, ranks would wait for one that rejects its own values. The
    only wait for the device.

    Raises:
        PeerError: this rank has no fault, but another one has.
        InputError: ranks differ in one of the named `sizes`.
    """
    facts = torch.cat([faults.view(1), torch.tensor(list(sizes.values()), device=faults.device)])
    by_rank, *columns = zip(*all_gather(facts, group).tolist(), strict=True)
    own = by_rank[0 if group is None else group.rank()]
    if own:
        return own
    if any(by_rank):
        ranks = [rank for rank, fault in enumerate(by_rank) if fault]
        raise PeerError(f"{where}: ranks {ranks} of tp_group reject their inputs; see their own messages.")
    for name, values in zip(sizes, columns, strict=True):
        if len(set(values)) > 1:
            raise InputError(
                f"{where}: expected the same number of {name} on all ranks of tp_group, got {list(values)}; "
                f"{_REMEDIES.get(name, _REMEDY)}."
            )
    return 0
