"""Environment variables of a worker: its place in the world, and its threads.

Free of torch: the thread counts must be set before torch is imported.
"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from ipaddress import ip_address

import psutil

from megatron_tip.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that no other host can reach."""

SPIN_COUNT = "20000"
"""Rounds that a thread of OpenMP waits awake, some 0.2 ms."""

_FAR_AWAY = "192.0.2.1"  # reserved for documentation: the default route leads there

RENDEZVOUS_PORTS = range(20_000, 30_000)
"""Ports of the workers' first contact under srun: below the range of ephemeral ports and below the servers' ports."""

_NCCL_DEFAULTS = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_EXPANDABLE_SEGMENTS = re.compile(r"(?:^|,)\s*expandable_segments\s*:\s*(\w+)\s*")


def is_worker(environ: Mapping[str, str]) -> bool:
    """Returns whether torchrun, srun or our own launcher started this process as one worker among others.

    A step with a single task (`srun --pty bash`) is a shell to start workers from, not a worker.
    """
    by_torchrun = "RANK" in environ and "WORLD_SIZE" in environ
    return by_torchrun or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def is_restarted(environ: Mapping[str, str]) -> bool:
    """Returns whether SLURM requeued this job, or torchrun restarted its workers after a failure."""
    return any(int(environ.get(name, "0")) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def nccl_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the settings of NCCL that all processes of one communicator on a node must share; kept if set.

    SGLang turns both off in its processes unless they are set, because its CUDA graphs and memory saver need that, and
    NCCL negotiates neither: a peer with other settings waits for a buffer that never comes.
    """
    return {name: environ.get(name, value) for name, value in _NCCL_DEFAULTS.items()}


def expands_segments(environ: Mapping[str, str]) -> bool:
    """Returns whether torch's allocator uses expandable segments, which CUDA IPC and SGLang's memory saver cannot."""
    found = (_EXPANDABLE_SEGMENTS.search(environ.get(name, "")) for name in _ALLOCATOR_VARIABLES)
    return any(match is not None and match[1].lower() == "true" for match in found)


def drop_expandable_segments(environ: MutableMapping[str, str]) -> None:
    """Takes expandable segments out of the allocator's options in `environ`, and leaves the others."""
    for name in _ALLOCATOR_VARIABLES:
        if name in environ:
            environ[name] = _EXPANDABLE_SEGMENTS.sub("", environ[name]).lstrip(",")


def worker_environment(environ: Mapping[str, str], *, threads: int, joins_servers: bool = False) -> dict[str, str]:
    """Returns the variables to set in a worker before torch is imported: its place, if from srun, its threads, the
    network interface that reaches the other hosts, and NCCL.

    Args:
        joins_servers: whether it shares an NCCL communicator with SGLang servers.

    Raises:
        ConfigError: srun's variables are incomplete, or the first host cannot be found.
    """
    place = {} if "RANK" in environ else _place_in_slurm_step(environ)
    placed = {**environ, **place}
    local_workers = int(placed.get("LOCAL_WORLD_SIZE", "1"))
    if place and not threads and "SLURM_CPUS_PER_TASK" in environ:
        threads, local_workers = int(environ["SLURM_CPUS_PER_TASK"]), 1
    shared = nccl_environment(environ) if joins_servers else {}
    return shared | place | thread_environment(threads, local_workers, environ) | _network_environment(placed)


def thread_environment(threads: int, local_workers: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the thread settings of one of `local_workers` that share `threads` CPU threads (0: all available).

    By default each worker would take one thread per core, and they would compete for cores. OMP_NUM_THREADS in
    `environ` is kept unless `threads` is set.

    A step consists of many short parallel regions. Between two of them a thread stays awake for 0.2 ms: if it slept at
    once (OMP_WAIT_POLICY=passive), each region would begin with a slow waking; with libgomp's default of some
    milliseconds it would take the core from its own partner as soon as another process wants one too. GOMP_SPINCOUNT in
    `environ` is kept.
    """
    count = str(max(1, (threads or available_threads()) // local_workers))
    if not threads:
        count = environ.get("OMP_NUM_THREADS", count)
    return {"OMP_NUM_THREADS": count, "GOMP_SPINCOUNT": environ.get("GOMP_SPINCOUNT", SPIN_COUNT)}


def gloo_interface(environ: Mapping[str, str], sources: Sequence[str], addresses: Mapping[str, Sequence[str]]) -> str:
    """Returns the network interface that gloo is to use; empty if gloo's own choice is right.

    By itself gloo takes the address that the host's name resolves to, which on many machines is 127.0.1.1: no other
    host reaches it there.

    Args:
        environ: with WORLD_SIZE, LOCAL_WORLD_SIZE and MASTER_ADDR; a GLOO_SOCKET_IFNAME of the user's is respected.
        sources: this host's addresses on the routes to the others, the best one first.
        addresses: of each of this host's interfaces.
    """
    is_one_host = environ.get("LOCAL_WORLD_SIZE", "1") == environ.get("WORLD_SIZE", "1")
    if is_one_host or environ.get("MASTER_ADDR") in LOOPBACK or "GLOO_SOCKET_IFNAME" in environ:
        return ""
    outward = [source for source in sources if not ip_address(source).is_loopback]
    return next((name for name, own in addresses.items() if outward and outward[0] in own), "")


def _network_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns GLOO_SOCKET_IFNAME by the route to the first host, or on that host by the default route."""
    sources = [source for target in (environ.get("MASTER_ADDR", ""), _FAR_AWAY) if (source := _source_to(target))]
    name = gloo_interface(environ, sources, _own_addresses())
    return {"GLOO_SOCKET_IFNAME": name} if name else {}


def server_network_environment(environ: Mapping[str, str], host: str) -> dict[str, str]:
    """Returns GLOO_SOCKET_IFNAME for a server that listens on `host`: the interface with that address.

    Empty on loopback, or if the user has set it.
    """
    source = _source_to(host)
    if "GLOO_SOCKET_IFNAME" in environ or not source or ip_address(source).is_loopback:
        return {}
    names = [name for name, own in _own_addresses().items() if source in own]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


def _own_addresses() -> dict[str, list[str]]:
    return {name: [one.address for one in own] for name, own in psutil.net_if_addrs().items()}


def source_address(host: str | None) -> str:
    """Returns this host's address on the route to `host`. Raises OSError without a route."""
    family, *_, destination = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect(destination)  # a datagram socket: chooses the route, sends nothing
        return str(way.getsockname()[0])


def free_port(host: str) -> int:
    """Returns a TCP port that is free now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _source_to(host: str) -> str:
    """Returns `source_address`; empty if there is no route."""
    try:
        return source_address(host)
    except OSError:
        return ""


def available_threads() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _place_in_slurm_step(environ: Mapping[str, str]) -> dict[str, str]:
    try:
        rank, local_rank = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
        hosts, job, step = environ["SLURM_STEP_NODELIST"], environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"]
        tasks_per_node = _expand_counts(environ["SLURM_STEP_TASKS_PER_NODE"])
        local_world_size = tasks_per_node[int(environ["SLURM_NODEID"])]
    except (KeyError, IndexError) as error:
        raise ConfigError(f"srun: expected the variables of a job step, got none for {error}") from None
    port = RENDEZVOUS_PORTS[(64 * int(job) + int(step)) % len(RENDEZVOUS_PORTS)]
    return {
        "RANK": rank,
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(hosts),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def _expand_counts(text: str) -> list[int]:
    """Expands `2(x3),1` to [2, 2, 2, 1]."""
    counts = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeats or 1)
    return counts


def _first_host(nodelist: str) -> str:
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ConfigError(
            f"srun: expected the first host of {nodelist} from `{' '.join(command)}`, got {error}; set MASTER_ADDR"
        ) from None
