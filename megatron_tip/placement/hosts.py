"""The machines of a run: how many nodes of which purpose, and the GPUs of each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tip.errors import ConfigError

_GPU_REQUESTS = (
    *("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS"),
    *("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "TIP_GPUS_PER_NODE"),
)


@dataclass(frozen=True)
class Hosts:
    """The nodes of a run: those that train come first, then those for rollouts, then those for the teacher.

    `workers`: trainer ranks. `workers_per_node`: of each training node; the last may have fewer. A worker knows only
    its own node and takes the others for the same, so on unequal nodes ranks may differ here. `gpus`: ids on every
    node, in the notation of CUDA_VISIBLE_DEVICES; empty: no GPUs. `first_port`: of the servers on each node; 0: free
    ones, chosen at the start. `rendezvous_port`: of the trainer, on the first node; 0: unknown. `by_job`: whether a
    SLURM script of ours runs there, which can start servers on all nodes.
    """

    workers: int
    workers_per_node: int
    gpus: tuple[int, ...] = ()
    rollout_nodes: int = 0
    teacher_nodes: int = 0
    first_port: int = 0
    rendezvous_port: int = 0
    by_job: bool = False

    @property
    def trainer_nodes(self) -> int:
        return -(-self.workers // self.workers_per_node)

    @property
    def nodes(self) -> int:
        return self.trainer_nodes + self.rollout_nodes + self.teacher_nodes


def hosts_elsewhere(workers: int, gpus_per_node: int) -> Hosts:
    """Returns nodes of `gpus_per_node` GPUs that `workers` ranks fill one after another; several are a SLURM job's."""
    per_node = min(workers, gpus_per_node or workers)
    return Hosts(workers, per_node, tuple(range(gpus_per_node)), by_job=workers > per_node)


def hosts_here(workers: int, environ: Mapping[str, str], num_gpus: int) -> Hosts:
    """Returns the machines of a run that starts here, if all nodes are like this process's own.

    Args:
        num_gpus: that torch sees.

    Raises:
        ConfigError: no GPU is visible although SLURM was asked for some.
    """
    if not num_gpus and (request := gpu_request(environ)):
        raise ConfigError(
            f"{request}: expected GPUs that torch can use on this machine, got none; look at nvidia-smi and "
            "`megatron-tip doctor` on this node, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )
    per_node = int(environ.get("LOCAL_WORLD_SIZE", workers)) if "RANK" in environ else workers
    gpus = visible_gpus(environ, num_gpus)
    if sees_only_its_own(environ, num_gpus):
        gpus = tuple(range(per_node))
    return Hosts(workers, per_node, gpus)


def sees_only_its_own(environ: Mapping[str, str], num_gpus: int) -> bool:
    """Returns whether SLURM shows each task only its own GPU (--gpus-per-task)."""
    return num_gpus == 1 and "SLURM_STEP_ID" in environ


def gpu_request(environ: Mapping[str, str]) -> str:
    """Returns the variable by which GPUs were asked for, as NAME=VALUE; empty if none was.

    An empty CUDA_VISIBLE_DEVICES takes the request back.
    """
    if environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ""
    for name in _GPU_REQUESTS:
        if environ.get(name, "0") not in ("0", ""):
            return f"{name}={environ[name]}"
    return ""


def visible_gpus(environ: Mapping[str, str], num_gpus: int) -> tuple[int, ...]:
    """Returns the ids of the GPUs that this process may use: the numbers in CUDA_VISIBLE_DEVICES.

    Without that variable, or if it has UUIDs, an id is the GPU's place among the visible ones.
    """
    entries = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(re.fullmatch(r"\s*\d+\s*", entry) for entry in entries):
        return tuple(map(int, entries))[:num_gpus]
    return tuple(range(num_gpus))


def device_names(gpus: tuple[int, ...], environ: Mapping[str, str]) -> str:
    """Returns the value of CUDA_VISIBLE_DEVICES for a process on `gpus`, ids of `visible_gpus`."""
    entries = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if any(entry.strip().startswith(("GPU-", "MIG-")) for entry in entries):
        return ",".join(entries[gpu].strip() for gpu in gpus)
    return ",".join(map(str, gpus))
