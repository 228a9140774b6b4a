"""The table of a placement, for people: like nodes share a row."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from megatron_tip.placement.placement import PlacedServer, Placement

_HEADER = ("nodes", "what", "GPUs", "port", "memory", "trainer ranks on the same GPUs")
_IN_WORDS = {
    "ipc": "by IPC (ipc), from each trainer rank to the server beside it",
    "broadcast": "in a process group (broadcast), from trainer rank 0",
    "folder": "as files (folder)",
}

_MOST_TRAINERS = 8
"""Trainer ranks per rank of student servers, beyond which the table warns of the waiting."""


def table_of(placement: Placement) -> list[str]:
    """Returns the lines of the table, and how weights reach the student servers."""
    rows = [_HEADER, *_trainer_rows(placement), *_server_rows(placement.servers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if placement.transport:
        lines.append(f"weights: {_IN_WORDS[placement.transport]}")
    hosts = placement.hosts
    if placement.students and hosts.trainer_nodes > 1 and not (hosts.by_job or hosts.rollout_nodes):
        lines.append(
            "servers on the first node alone: a run that srun or torchrun starts has none on the others; "
            "`megatron-tip submit` starts them on every node"
        )
    ranks = sum(len(server.places) for server in placement.students)
    if ranks and len(placement.trainers) > _MOST_TRAINERS * ranks:
        lines.append(
            f"few servers: {len(placement.students)} for {len(placement.trainers)} workers, which wait while it "
            "generates; raise rollout.servers, set sglang.share_gpus = true, or give rollouts nodes of their own "
            "(submit --script train_disaggregated --rollout-nodes N)"
        )
    return lines


def _trainer_rows(placement: Placement) -> list[tuple[str, ...]]:
    gpus_of = defaultdict[int, list[int | None]](list)
    for place in placement.trainers:
        gpus_of[place.node].append(place.gpu)
    nodes_of = defaultdict[tuple[int | None, ...], list[int]](list)
    for node, gpus in gpus_of.items():
        nodes_of[tuple(gpus)].append(node)
    rows, first = [], 0
    for gpus, nodes in nodes_of.items():
        last = first + len(gpus) * len(nodes) - 1
        ranks = f"trainer, rank {first}" if first == last else f"trainer, ranks {first}-{last}"
        rows.append((_ranges(nodes), ranks, _gpus(gpus), "", "", ""))
        first = last + 1
    return rows


def _server_rows(servers: Sequence[PlacedServer]) -> list[tuple[str, ...]]:
    like = defaultdict[tuple[object, ...], list[PlacedServer]](list)
    for server in servers:
        gpus = tuple(place.gpu for place in server.places)
        is_shared = tuple(rank is not None for rank in server.sharers)
        like[server.role, gpus, server.ports, server.memory_fraction, is_shared, len(server.nodes)].append(server)
    return [_server_row(same) for same in like.values()]


def _server_row(same: Sequence[PlacedServer]) -> tuple[str, ...]:
    one = same[0]
    role, ports = f"{one.role} server", ", ".join(map(str, one.ports)) or "free"
    name = f"{role} {one.index}" if len(same) == 1 else f"{role}s {_ranges(server.index for server in same)}"
    ranks = _ranges(rank for server in same for rank in server.sharers if rank is not None)
    return (
        _ranges(node for server in same for node in server.nodes),
        name + (f", tp {len(one.places)}" if len(one.places) > 1 else ""),
        _gpus([place.gpu for place in one.places]),
        ports,
        f"{one.memory_fraction:.2f}" if one.memory_fraction else "auto",
        ranks or "-",
    )


def _gpus(gpus: Sequence[int | None]) -> str:
    return _ranges(gpu for gpu in gpus if gpu is not None) or "CPU"


def _ranges(numbers: Iterable[int]) -> str:
    """Returns numbers in a short notation: [0, 1, 2, 6, 8, 16, 24] is "0-2, 6, 8, 16, ..., 24"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(parts if len(parts) <= 4 else [*parts[:2], "...", parts[-1]])
