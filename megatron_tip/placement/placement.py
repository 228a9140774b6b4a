"""The placement of a run: which GPU each trainer rank and each server has, and how weights travel between them.

`place` is a pure function. The launcher, the SLURM scripts, `submit`, `doctor`, the dry run and the engine all ask it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.parallel.environment import RENDEZVOUS_PORTS
from megatron_tip.placement.hosts import Hosts
from megatron_tip.placement.slots import Place, Slots, fill, slots_of

Role = Literal["student", "teacher"]
Transport = Literal["ipc", "broadcast", "folder"]

SHARED_MEMORY_FRACTION = 0.3
"""Share of a GPU's memory that a server takes beside a trainer rank unless sglang.memory_fraction is set."""

_CPU_MEMORY_FRACTION = 0.5
_TRAINER_MINIMUM = 0.1
"""Share of a GPU's memory that CUDA's context, NCCL's buffers and the smallest trainer need."""

_APART = (
    "set sglang.share_gpus = true, start fewer workers (--nproc, TIP_TASKS_PER_NODE), or give rollouts nodes of their "
    "own (submit --script train_disaggregated --rollout-nodes N)"
)


@dataclass(frozen=True)
class PlacedServer:
    """A server with one place per tensor-parallel rank.

    `ports`: on its first node; the second one, for the first contact of a server over several nodes; empty: free ones
    are chosen at the start. `memory_fraction`: share of each GPU's memory for weights and cache; 0: SGLang chooses.
    `sharers`: per rank, the trainer rank on the same GPU (without GPUs, the first one on the same node) or None; empty
    if no rank has one.
    """

    role: Role
    index: int
    places: tuple[Place, ...]
    ports: tuple[int, ...]
    memory_fraction: float
    sharers: tuple[int | None, ...] = ()

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(place.node for place in self.places))

    @property
    def port(self) -> int:
        return self.ports[0] if self.ports else 0

    @property
    def is_beside_trainers(self) -> bool:
        """Whether each rank shares its GPU, or without GPUs its node, with a trainer rank."""
        return bool(self.sharers) and None not in self.sharers

    @property
    def memory_saver(self) -> bool:
        """Whether it must be able to give its memory back: it shares a GPU with the trainer."""
        return bool(self.sharers) and self.places[0].gpu is not None

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The trainer rank whose memory each rank can open: `sharers`, where all have one."""
        return tuple(rank for rank in self.sharers if rank is not None) if self.is_beside_trainers else ()

    def gpus_on(self, node: int) -> tuple[int, ...]:
        """Returns its GPUs on that node, in the order of its ranks; empty on a CPU."""
        return tuple(place.gpu for place in self.places if place.node == node and place.gpu is not None)

    def __str__(self) -> str:
        return f"{self.role} server {self.index}"


@dataclass(frozen=True)
class Placement:
    """The whole placement. `trainers`: the place of each rank. `transport`: of weights; None without SGLang."""

    hosts: Hosts
    trainers: tuple[Place, ...]
    servers: tuple[PlacedServer, ...]
    transport: Transport | None

    @property
    def students(self) -> tuple[PlacedServer, ...]:
        return tuple(server for server in self.servers if server.role == "student")

    @property
    def handing_ranks(self) -> tuple[int, ...]:
        """The trainer ranks that hand weights to servers by IPC; empty with another transport."""
        ranks = {rank for server in self.students for rank in server.neighbours}
        return tuple(sorted(ranks)) if self.transport == "ipc" else ()

    @property
    def memory_beside_trainers(self) -> float:
        """The largest share of memory that servers take on a trainer's GPU."""
        return max((server.memory_fraction for server in self.servers if server.memory_saver), default=0.0)

    def visible_position(self, local_rank: int) -> int:
        """Returns the place of a worker's GPU among the visible ones: skips the GPUs of servers.

        Raises:
            ConfigError: its machine has no GPU left for it.
        """
        on_node = [place.gpu for place in self.trainers if place.node == 0]
        if local_rank >= len(on_node):
            raise ConfigError(
                f"LOCAL_RANK={local_rank}: expected at most {len(on_node)} workers on each machine, as on the first one"
            )
        gpu = on_node[local_rank]
        assert gpu is not None, "asked on a GPU only"
        return self.hosts.gpus.index(gpu)


def place(config: Config, hosts: Hosts) -> Placement:
    """Returns who runs where.

    Student servers run on the nodes for rollouts if there are any; else on the trainer's GPUs (sglang.share_gpus), or
    on the training nodes' other GPUs. The run itself starts them on the first node; a job of several training nodes has
    them on each. Servers that are only given by URL have no place here.

    Raises:
        ConfigError: it is impossible, or two processes claim one GPU or port that they cannot share.
    """
    slots = _student_slots(config, hosts)
    students = fill(slots, "rollout.servers")
    trainers = _trainers(hosts, _servers_gpus(config, hosts, slots))
    _check_given(config, hosts, len(students))
    teachers = fill(_teacher_slots(config, hosts), "--teacher-nodes")
    servers = [_server(config, "student", index, places, trainers) for index, places in enumerate(students)]
    servers += [_server(config, "teacher", index, places, ()) for index, places in enumerate(teachers)]
    numbered = tuple(_with_ports(servers, hosts, students_by_job=job_starts_students(config, hosts)))
    _check_gpus(trainers, numbered)
    is_served = config.rollout.engine == "sglang" or bool(hosts.rollout_nodes)
    transport = _transport(config, numbered[: len(students)], trainers) if is_served else None
    return Placement(hosts, trainers, numbered, transport)


def job_starts_students(config: Config, hosts: Hosts) -> bool:
    """Returns whether the SLURM script starts the student servers.

    Otherwise the run starts them on its first node, or they are given by URL and run already.
    """
    on_training_nodes = hosts.by_job and hosts.trainer_nodes > 1 and not config.rollout.server_urls
    return bool(hosts.rollout_nodes) or on_training_nodes


def num_workers_on(config: Config, num_gpus: int) -> int:
    """Returns how many workers to start on one machine: one per GPU that our own servers leave."""
    rollout, sglang = config.rollout, config.sglang
    if rollout.engine != "sglang" or sglang.share_gpus:
        return num_gpus
    needed = 0 if rollout.server_urls else max(1, rollout.servers) * sglang.tensor_parallel_size
    return max(1, num_gpus - (len(sglang.gpus) or needed))


def _servers_gpus(config: Config, hosts: Hosts, slots: Slots) -> set[int]:
    """Returns the GPUs of a training node that its ranks leave to servers."""
    if hosts.rollout_nodes or config.sglang.share_gpus or config.rollout.engine != "sglang":
        return set()
    return set(slots.gpus) or set(config.sglang.gpus)  # the latter if the job has started them and gives their URLs


def _student_slots(config: Config, hosts: Hosts) -> Slots:
    """Returns where student servers can be."""
    sglang, wanted = config.sglang, config.rollout.servers
    tp, trainer_nodes = sglang.tensor_parallel_size, hosts.trainer_nodes
    if hosts.rollout_nodes:
        nodes = tuple(range(trainer_nodes, trainer_nodes + hosts.rollout_nodes))
        return slots_of(nodes, _own_gpus(config, hosts) or hosts.gpus, tp, wanted, "sglang.tensor_parallel_size")
    given = config.rollout.server_urls
    if config.rollout.engine != "sglang" or (given and not sglang.share_gpus):
        return Slots()
    nodes = tuple(range(trainer_nodes)) if given or job_starts_students(config, hosts) else (0,)
    gpus = _own_gpus(config, hosts)
    if (
        gpus
        and not wanted % len(nodes)
        and (len(gpus) * len(nodes) != wanted * tp if wanted else tp < len(gpus) and len(gpus) % tp)
    ):
        number = f"{wanted * tp // len(nodes)} for rollout.servers = {wanted}" if wanted else "whole servers"
        raise ConfigError(
            f"sglang.gpus: expected {number} of tensor_parallel_size {tp}{f' on {len(nodes)} nodes' * (len(nodes) > 1)}"
            f", got {len(gpus)}"
        )
    if not hosts.gpus:
        wanted = wanted or len(given)
    elif not gpus and sglang.share_gpus:
        gpus = hosts.gpus[: hosts.workers_per_node]
    elif not gpus:
        wanted = wanted or len(nodes)
        gpus = hosts.gpus[-min(len(hosts.gpus), -(-wanted // len(nodes)) * tp) :]
    return slots_of(nodes, gpus, tp, wanted, "sglang.tensor_parallel_size")


def _own_gpus(config: Config, hosts: Hosts) -> tuple[int, ...]:
    """Returns sglang.gpus.

    Raises:
        ConfigError: one of them is named twice or is not visible.
    """
    gpus = config.sglang.gpus
    if twice := [gpu for gpu, count in Counter(gpus).items() if count > 1]:
        raise ConfigError(f"sglang.gpus: expected different GPUs, got {twice[0]} twice; two servers cannot share one")
    if unknown := [gpu for gpu in gpus if gpu not in hosts.gpus]:
        visible = ", ".join(map(str, hosts.gpus)) or "none: it would run on the CPU"
        raise ConfigError(
            f"sglang.gpus: expected some of the visible GPUs ({visible}), got {unknown[0]}; CUDA_VISIBLE_DEVICES says "
            "which are visible"
        )
    return gpus


def _teacher_slots(config: Config, hosts: Hosts) -> Slots:
    if not hosts.teacher_nodes:
        return Slots()
    first = hosts.trainer_nodes + hosts.rollout_nodes
    nodes = tuple(range(first, first + hosts.teacher_nodes))
    return slots_of(nodes, hosts.gpus, config.teacher.tensor_parallel_size, 0, "teacher.tensor_parallel_size")


def _trainers(hosts: Hosts, taken: set[int]) -> tuple[Place, ...]:
    """Returns the place of each rank; every node's ranks use the GPUs that are not `taken`, in their order."""
    per_node = hosts.workers_per_node
    gpus = [gpu for gpu in hosts.gpus if gpu not in taken]
    if hosts.gpus and per_node > len(hosts.gpus):
        raise ConfigError(
            f"workers: expected at most one per GPU, {len(hosts.gpus)} on this machine, got {per_node}; start fewer "
            "workers here (--nproc)"
        )
    if hosts.gpus and per_node > len(gpus):
        raise ConfigError(
            f"sglang: expected other GPUs for the servers than the trainer's {per_node} of each node, got "
            f"{', '.join(map(str, sorted(taken)))} of {len(hosts.gpus)}: trainer rank {len(gpus)} and a server would "
            f"claim one GPU; {_APART}"
        )
    ids = gpus if hosts.gpus else [None] * per_node
    return tuple(Place(rank // per_node, ids[rank % per_node]) for rank in range(hosts.workers))


def _server(
    config: Config, role: Role, index: int, places: tuple[Place, ...], trainers: Sequence[Place]
) -> PlacedServer:
    """Returns a server without its ports. `trainers`: those that it may share GPUs with."""
    ranks: dict[Place, int] = {}
    for rank, trainer in enumerate(trainers):
        ranks.setdefault(trainer, rank)
    sharers = tuple(ranks.get(place) for place in places)
    if not any(rank is not None for rank in sharers):
        sharers = ()
    fraction = config.sglang.memory_fraction if role == "student" else 0.0
    if not fraction and places[0].gpu is None:
        fraction = _CPU_MEMORY_FRACTION
    elif not fraction and sharers:
        fraction = SHARED_MEMORY_FRACTION
    if sharers and places[0].gpu is not None and fraction > 1 - _TRAINER_MINIMUM:
        raise ConfigError(
            f"sglang.memory_fraction: expected at most {1 - _TRAINER_MINIMUM:g} on GPUs that the trainer shares, got "
            f"{fraction:g}; {role} server {index} and trainer rank {next(r for r in sharers if r is not None)} would "
            "need more than the whole memory of a GPU; or give rollouts GPUs of their own (sglang.gpus)"
        )
    return PlacedServer(role, index, places, (), fraction, sharers)


def _with_ports(servers: Sequence[PlacedServer], hosts: Hosts, *, students_by_job: bool) -> list[PlacedServer]:
    """Returns the servers; those that the job starts have the ports that follow `hosts.first_port` on each node.

    Raises:
        ConfigError: a port does not exist, or may be the trainer's.
    """
    used, numbered = Counter[int](), []
    for server in servers:
        node, count = server.places[0].node, 1 + (len(server.nodes) > 1)
        first = hosts.first_port + used[node]
        is_by_job = server.role == "teacher" or students_by_job
        ports = range(first, first + count) if hosts.first_port and is_by_job else ()
        used[node] += len(ports)
        for port in ports:
            _check_port(server, port, hosts)
        numbered.append(replace(server, ports=tuple(ports)))
    return numbered


def _check_port(server: PlacedServer, port: int, hosts: Hosts) -> None:
    if not 1024 <= port <= 65535:
        raise ConfigError(
            f"TIP_SGLANG_PORT={hosts.first_port}: expected ports from 1024 to 65535, got {port} for {server}; set a "
            "lower first port"
        )
    if port in RENDEZVOUS_PORTS or port == hosts.rendezvous_port:
        raise ConfigError(
            f"TIP_SGLANG_PORT={hosts.first_port}: expected ports other than the trainer's ({RENDEZVOUS_PORTS.start} to "
            f"{RENDEZVOUS_PORTS.stop - 1}, or MASTER_PORT), got {port} for {server}; set 31000"
        )


def _check_gpus(trainers: Sequence[Place], servers: Sequence[PlacedServer]) -> None:
    """Raises an AssertionError if two servers, or two trainer ranks, have one GPU."""
    for places in (list(trainers), [place for server in servers for place in server.places]):
        on_gpus = [place for place in places if place.gpu is not None]
        assert len(on_gpus) == len(set(on_gpus)), "one GPU has two trainer ranks or two servers"


def _check_given(config: Config, hosts: Hosts, num_placed: int) -> None:
    """Refuses URLs that are not those of the servers beside the trainer, in number."""
    urls = config.rollout.server_urls
    if urls and not hosts.rollout_nodes and config.sglang.share_gpus and len(urls) != num_placed:
        raise ConfigError(
            f"rollout.server_urls: expected {num_placed} with sglang.share_gpus, one for each server on the trainer's "
            f"GPUs, node by node, got {len(urls)}; if they run elsewhere, set sglang.share_gpus = false"
        )


def _transport(config: Config, students: Sequence[PlacedServer], trainers: Sequence[Place]) -> Transport:
    """Returns the configured transport, or with "auto" the fastest one that the placement allows.

    Raises:
        ConfigError: the configured one is impossible.
    """
    wanted, first = config.sync.transport, trainers[0]
    apart = next((server for server in students if not server.is_beside_trainers), None)
    can_share = bool(students) and apart is None
    in_the_way = next((server for server in students if first.gpu is not None and first in server.places), None)
    if wanted == "ipc" and not can_share:
        raise _no_ipc(apart)
    if wanted == "broadcast" and in_the_way is not None:
        raise ConfigError(
            f'sync.transport = "broadcast": expected student servers on other GPUs than that of trainer rank 0, got '
            f"{in_the_way} on {first}; NCCL refuses two ranks of one communicator on one GPU: set sync.transport = "
            '"auto"'
        )
    if wanted != "auto":
        return wanted
    if can_share:
        return "ipc"
    return "folder" if in_the_way is not None else "broadcast"


def _no_ipc(apart: PlacedServer | None) -> ConfigError:
    got = f"{apart} on {apart.places[0]}" if apart else "servers that are only given by URL"
    return ConfigError(
        f'sync.transport = "ipc": expected all student servers on GPUs of this run\'s trainer, got {got}; set '
        'sync.transport = "auto", or sglang.share_gpus = true'
    )
