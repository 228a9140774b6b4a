"""This process's place in the world: rank, device, default process group."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tip.errors import ConfigError


@dataclass(frozen=True)
class Worker:
    """One process of the run. `device` is its GPU, or the CPU on a machine without one."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def init_distributed(*, timeout_seconds: float = 1800.0) -> Worker:
    """Returns this process's place, with the default process group made. Collective: every worker calls it once.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. With CUDA, tensors on the GPU go over NCCL and
    tensors on the CPU over gloo; without, all go over gloo.

    Args:
        timeout_seconds: after which a collective that a rank does not join fails. The first process generates while
            the others wait for it in one, so it must exceed a rollout.

    Raises:
        ConfigError: more workers than GPUs on this machine, or MASTER_PORT is taken.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_seconds)
        )
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"MASTER_ADDR:MASTER_PORT = {address}: expected a free port on rank 0 that all ranks reach, got: "
            f"{str(error).splitlines()[0]}; set MASTER_PORT to another port"
        ) from error
    return Worker(rank, world_size, local_rank, device)


def destroy_distributed() -> None:
    """Waits for all workers, then takes the process groups down.

    For a run that succeeded: a worker that fails must end without it, or its peers fail, and report, before it does.
    """
    dist.barrier()
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1 and "SLURM_STEP_ID" in os.environ:
        local_rank = 0  # SLURM shows each task its own GPU alone (--gpus-per-task)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"expected at most one worker a GPU, {torch.cuda.device_count()} on this machine, got local rank "
            f"{local_rank}; start fewer workers here"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
