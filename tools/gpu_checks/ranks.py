"""Worlds of a few processes that share one GPU, each taken by NCCL for a host of its own; over gloo on a CPU."""

import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tip.parallel.environment import free_port
from tools.gpu_checks.task import Task

ROOT = Path(__file__).parents[2]


class RankError(Exception):
    """A rank that failed, died or did not end; the message has its last words."""


def run_ranks(
    place: str,
    world_size: int,
    task: Task,
    *arguments: Any,
    seconds: float,
    may_die: Sequence[int] = (),
    **environment: str,
) -> list[Any]:
    """Returns what the function `place`, "module:function", returns on each rank of a new world; None of a dead rank.

    The processes are new ones: a fork cannot use CUDA. Each has joined the world when the function is called with
    `arguments`. They and what it returns are tensors, texts, numbers, and lists, tuples and dictionaries of them: both
    go through files in a new folder, of which nothing else is read.

    Args:
        seconds: until all ranks are ended.
        may_die: ranks whose death is no failure.
        environment: variables that replace those of `environment_of`.

    Raises:
        RankError: a rank raised something, died, or was still running.
    """
    folder = Path(tempfile.mkdtemp(dir=task.folder))
    torch.save(arguments, folder / "arguments")
    port = free_port("127.0.0.1")
    places = [{**environment_of(rank, world_size, port), **environment} for rank in range(world_size)]
    processes = [_started(place, folder, one) for one in places]
    codes = _ended(processes, time.monotonic() + seconds, may_die)
    failed = [rank for rank, code in enumerate(codes) if code != 0 and rank not in may_die]
    if failed:
        rank = min(failed, key=lambda rank: _failed_at(folder, rank))
        how = f"ended with {codes[rank]}" if codes[rank] is not None else f"still ran after {seconds:.0f} s"
        raise RankError(f"rank {rank} of {place} {how}: {_last_words(folder, rank)}")
    results = [folder / f"{rank}.result" for rank in range(world_size)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in results]


def environment_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Returns the variables of one rank.

    NCCL refuses two ranks of one host on one GPU, and tells hosts apart by NCCL_HOSTID. Ranks of different hosts then
    meet over loopback. SLURM_STEP_ID says, as under srun with --gpus-per-task, that the one GPU that a process sees is
    its own.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_HOSTID": f"check-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_NET": "Socket",
        "NCCL_IB_DISABLE": "1",
        "SLURM_STEP_ID": "0",
    }


def join_alone() -> None:
    """Makes this process the only rank of a world, with the project's own set-up."""
    from megatron_tip.parallel.distributed import init_distributed

    os.environ.update(environment_of(0, 1, free_port("127.0.0.1")))
    init_distributed()


def _started(place: str, folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with (folder / f"{environment['RANK']}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tools.gpu_checks.ranks", place, str(folder)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _ended(processes: Sequence[subprocess.Popen[bytes]], deadline: float, may_die: Sequence[int]) -> list[int | None]:
    """Returns the exit codes, None of those that had to be killed. The first failure ends the others soon after."""
    wanted = [process for rank, process in enumerate(processes) if rank not in may_die]
    while any(process.poll() is None for process in wanted) and time.monotonic() < deadline:
        if any(process.poll() for process in wanted):
            deadline = min(deadline, time.monotonic() + 3.0)  # the first one's peers have time to fail by themselves
        time.sleep(0.02)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    return codes


def _failed_at(folder: Path, rank: int) -> float:
    """Returns when the rank wrote its error, so that the first failure counts and not that of its peers."""
    error = folder / f"{rank}.error"
    return error.stat().st_mtime if error.exists() else float("inf")


def _last_words(folder: Path, rank: int) -> str:
    error = folder / f"{rank}.error"
    text = error.read_text() if error.exists() else (folder / f"{rank}.log").read_text(errors="replace")
    return text[-2500:]


def main(place: str, folder: Path, environ: Mapping[str, str]) -> None:
    rank = environ["RANK"]
    try:
        from megatron_tip.parallel.distributed import init_distributed

        init_distributed(timeout_seconds=300.0)
        module, function = place.split(":")
        arguments = torch.load(folder / "arguments", weights_only=True)
        result = getattr(importlib.import_module(module), function)(*arguments)
        torch.save(result, folder / f"{rank}.result")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # peers need not be there any more for the groups to be destroyed


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), os.environ)
