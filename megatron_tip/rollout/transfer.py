"""The way of rollouts from the first process, where the engine lives, to all others."""

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
    """Returns what `generate` returns on the first rank of `group`, the only one to call it, on all its ranks.

    Args:
        group: `None` means the world.
        device: where the travelling bytes lie; what the group's backend carries.

    Collectives and errors: those of `run_on`.
    """
    source = dist.get_global_rank(group, 0) if group is not None else 0
    return run_on(source, generate, device=device, group=group, encode=encode_rollouts, decode=decode_rollouts)
