"""This process's place in the world: rank, device, default process group."""

import datetime
import logging
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.cuda import nccl

from megatron_tip.errors import ConfigError

logger = logging.getLogger(__name__)

_OPEN_FILES = 65536
_FIRST_WORD_SECONDS, _NEXT_WORD_SECONDS = 5.0, 30.0


@dataclass(frozen=True)
class Worker:
    """One process of the run. `device` is its GPU, or the CPU on a machine without one."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def init_distributed(*, timeout_seconds: float = 1800.0, device_index: int | None = None) -> Worker:
    """Creates the default process group; returns this process's place. Collective: every worker calls it once.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. With CUDA, tensors on the GPU go over NCCL and
    tensors on the CPU over gloo; without CUDA, all go over gloo.

    Args:
        timeout_seconds: until a collective fails that some rank has not joined. The other ranks wait in one while the
            first process generates, so it must exceed a rollout.
        device_index: this process's GPU among those that it sees; None: that of its local rank.

    Raises:
        ConfigError: this machine has more workers than GPUs, or MASTER_PORT is taken.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank if device_index is None else device_index)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    _allow_open_files(_OPEN_FILES)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        with _waiting_is_logged(rank, world_size, address) if local_rank == 0 else nullcontext():
            dist.init_process_group(
                backend, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_seconds)
            )
    except dist.DistStoreError as error:
        raise ConfigError(
            f"WORLD_SIZE = {world_size}: expected all {world_size} ranks at MASTER_ADDR:MASTER_PORT = {address} in "
            f"time, got: {str(error).splitlines()[0]}; start them all, or unset RANK and WORLD_SIZE"
        ) from error
    except dist.DistNetworkError as error:
        expected, remedy = "a free port on rank 0 that all ranks reach", "set MASTER_PORT to another port"
        if rank:
            expected, remedy = "rank 0 there", "start all ranks, or unset RANK and WORLD_SIZE"
        raise ConfigError(
            f"MASTER_ADDR:MASTER_PORT = {address}: expected {expected}, got: {str(error).splitlines()[0]}; {remedy}"
        ) from error
    if rank == 0:
        _log_device(device, world_size)
    return Worker(rank, world_size, local_rank, device)


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files to `count`, or as far as it may.

    gloo keeps a socket open to every other rank of each group: above a common limit of 1,024 from some 600 ranks on.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _log_device(device: torch.device, world_size: int) -> None:
    """Logs what the run computes on; loudly if that is a CPU, which may be a mistake."""
    if device.type == "cuda":
        version = ".".join(map(str, nccl.version()))
        logger.info("%d workers on GPUs (%s), NCCL %s", world_size, torch.cuda.get_device_name(device), version)
        return
    logger.warning("NO GPU is visible to torch %s: %d workers run on the CPU", torch.__version__, world_size)


@contextmanager
def _waiting_is_logged(rank: int, world_size: int, address: str) -> Iterator[None]:
    """Logs whom this process waits for while the block lasts: after a few seconds, and again and again.

    RANK and WORLD_SIZE that an earlier job left in the environment make a process wait for ranks that nobody starts.
    """
    others = f"the other {world_size - 1} ranks to connect to it" if rank == 0 else "rank 0"
    over = threading.Event()

    def log() -> None:
        pause, waited = _FIRST_WORD_SECONDS, 0.0
        while not over.wait(pause):
            waited, pause = waited + pause, _NEXT_WORD_SECONDS
            logger.warning(
                "rank %d of %d has waited %.0f s for %s at MASTER_ADDR:MASTER_PORT = %s; if nobody starts them, unset "
                "RANK and WORLD_SIZE",
                *(rank, world_size, waited, others, address),
            )

    threading.Thread(target=log, daemon=True, name="waiting").start()
    try:
        yield
    finally:
        over.set()


def destroy_distributed() -> None:
    """Waits for all workers, then destroys the process groups.

    Only for a run that succeeded: a failing worker must end without it, or its peers would fail, and report, first.
    """
    dist.barrier()
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1 and "SLURM_STEP_ID" in os.environ:
        local_rank = 0  # SLURM shows each task only its own GPU (--gpus-per-task)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"expected at most one worker per GPU, {torch.cuda.device_count()} on this machine, got local rank "
            f"{local_rank}; start fewer workers here"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
