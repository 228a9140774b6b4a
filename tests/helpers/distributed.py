"""Runs a test function in several gloo workers on this machine."""

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_workers(
    fn: Callable[..., Any], world_size: int, tmp_path: Path, *args: Any, timeout_seconds: float = 60.0
) -> list[Any]:
    """Returns `fn(*args)` of every rank, run in `world_size` processes with a gloo world on a FileStore.

    They are forked from a server that has imported torch and Megatron once, and nothing else has happened in it.
    `fn` and `args` must be picklable (a module-level function). Raises AssertionError with the traceback of the rank
    that failed first, or naming the ranks that were still running at the timeout.
    """
    folder = tmp_path / f"workers_{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "megatron_tip.training.loop"])
    workers = [
        context.Process(target=_worker, args=(fn, rank, world_size, str(folder), timeout_seconds, args), daemon=True)
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + timeout_seconds
    try:
        while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                time.sleep(0.2)  # the rank that failed first has written its traceback by now
                break
            time.sleep(0.02)
        still_running = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
    hung = {rank: stack for rank in still_running if (stack := (folder / f"{rank}.stack").read_text())}
    stacks = "\n".join(f"rank {rank}:\n{stack}" for rank, stack in hung.items())
    failures = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    assert not failures or hung, f"rank {failures[0].stem} failed first:\n{failures[0].read_text()}"
    assert not still_running, f"ranks {still_running} still ran after {timeout_seconds} s: a hang\n{stacks}"
    codes = [worker.exitcode for worker in workers]
    assert codes == [0] * world_size, f"exit codes {codes}"
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _worker(
    fn: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    stack = Path(folder, f"{rank}.stack").open("w")  # noqa: SIM115  (open until the process ends)
    faulthandler.dump_traceback_later(max(1.0, timeout - 3.0), file=stack)
    try:
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout)
        )
        result = fn(*args)
        Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise
