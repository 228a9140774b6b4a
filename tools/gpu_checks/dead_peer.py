"""The end of a process group whose peer has died: does abort return, does destroy?"""

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from tools.gpu_checks.ranks import RankError, run_ranks
from tools.gpu_checks.task import Task

_UNWATCHED = "abort without torch's watchdog"
"""By default torch's own watchdog may end the process as soon as NCCL reports that the peer is gone."""
_WAYS = {"abort": "abort", "destroy": "destroy", _UNWATCHED: "abort"}


def end_group(task: Task) -> None:
    """Notes what the living rank met in its collective, and how soon each way of ending the group returned."""
    place, seconds = "tools.gpu_checks.dead_peer:ended", task.size(22, 90)
    for name, way in task.size(_WAYS, {"abort": "abort"}).items():
        start = time.monotonic()
        handling = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"} if name == _UNWATCHED else {}
        try:
            found, _ = run_ranks(place, 2, task, task.device, way, seconds=seconds, may_die=(1,), **handling)
        except RankError as error:
            found = {"ended_after_s": round(time.monotonic() - start, 1), "error": str(error)[-300:]}
        task.note(**{name: found})


def ended(device: str, way: str) -> dict[str, Any]:
    """Returns on rank 0 what became of an all-reduce with rank 1, which kills itself, and the seconds of the end."""
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    assert ones.item() == 2.0, "both ranks are there"
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.0)
    met = "nothing within 3 s"
    try:
        work: Any = dist.all_reduce(ones, async_op=True)
        deadline = time.monotonic() + 3.0
        while not work.is_completed() and time.monotonic() < deadline:
            time.sleep(0.05)
        if work.is_completed():
            work.wait()
            met = "completed"
    except (RuntimeError, ValueError) as error:  # gloo's and NCCL's own
        met = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    start = time.monotonic()
    try:
        if way == "abort":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        how = "returned"
    except RuntimeError as error:
        how = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return {"met": met, "end": how, "end_s": round(time.monotonic() - start, 2)}
