"""Two NCCL ranks on one GPU: what other checks rely on."""

import torch
import torch.distributed as dist

from tools.gpu_checks.ranks import RankError, run_ranks
from tools.gpu_checks.task import Task

_SUM = "tools.gpu_checks.nccl:summed"


def two_ranks(task: Task) -> None:
    """Notes what NCCL says to two ranks of one host on one GPU; requires that it takes them for two hosts."""
    sums = run_ranks(_SUM, 2, task, task.device, seconds=task.size(25, 100))
    task.note(as_two_hosts=sums)
    task.require(sums == [[3.0, 1.0, 2.0]] * 2, f"expected the sum 3 and both ranks' values, got {sums}")
    if not task.on_gpu:
        task.note(as_one_host="gloo does not mind")
        return
    try:
        run_ranks(_SUM, 2, task, task.device, seconds=15, NCCL_HOSTID="check-one", NCCL_DEBUG="WARN")
        task.note(as_one_host="works")
    except RankError as refusal:
        lines = [line for line in str(refusal).splitlines() if "uplicate" in line or "invalid usage" in line]
        task.note(as_one_host="refused: " + (lines[0].strip() if lines else str(refusal)[-300:]))


def summed(device: str) -> list[float]:
    """Returns the sum of the ranks' numbers, from 1, and these numbers: an all-reduce and an all-gather."""
    own = torch.full((1,), dist.get_rank() + 1.0, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    dist.all_reduce(own)
    return [own.item(), *(one.item() for one in gathered)]
