"""The broadcast of rollouts from the first process, which has the engine, to all others."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_tip.parallel.together import run_on
from megatron_tip.records import Rollout
from megatron_tip.rollout.codec import decode_rollouts, encode_rollouts


def broadcast_rollouts(
    generate: Callable[[], list[Rollout] | None],
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str = "cpu",
) -> list[Rollout] | None:
    """Calls `generate` on the first rank of `group` and returns its result on all ranks.

    Args:
        group: `None` means the world.
        device: device of the broadcast bytes; the group's backend must support it.

    Collectives and errors: those of `run_on`.
    """
    source = dist.get_global_rank(group, 0) if group is not None else 0
    return run_on(source, generate, device=device, group=group, encode=encode_rollouts, decode=decode_rollouts)
