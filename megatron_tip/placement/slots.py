"""Where servers of one kind can be: groups of GPUs, one per tensor-parallel rank, within a node or over several."""

from dataclasses import dataclass

from megatron_tip.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """A node, counted from 0, and the id of one of its GPUs; None: its CPU."""

    node: int
    gpu: int | None

    def __str__(self) -> str:
        return f"node {self.node}" + (f", GPU {self.gpu}" if self.gpu is not None else "")


@dataclass(frozen=True)
class Slots:
    """`nodes` with `gpus` on each, for servers of `tp_size` ranks. `wanted`: servers; 0: as many as fit."""

    nodes: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()
    tp_size: int = 1
    wanted: int = 0

    @property
    def nodes_per_server(self) -> int:
        return max(1, self.tp_size // len(self.gpus)) if self.gpus else 1


def slots_of(nodes: tuple[int, ...], gpus: tuple[int, ...], tp_size: int, wanted: int, setting: str) -> Slots:
    """Returns the slots. `setting`: the name of `tp_size` in the configuration.

    Raises:
        ConfigError: a server does not fit on a node, nor evenly over whole nodes.
    """
    slots = Slots(nodes, gpus, tp_size, wanted)
    over_nodes = bool(gpus) and tp_size > len(gpus)
    if over_nodes and (tp_size % len(gpus) or len(nodes) % slots.nodes_per_server):
        raise ConfigError(
            f"{setting}: expected at most the {len(gpus)} GPUs that servers have on a node, or all GPUs of several "
            f"nodes, got {tp_size} with {len(nodes)} nodes"
        )
    return slots


def fill(slots: Slots, setting: str) -> list[tuple[Place, ...]]:
    """Returns the places of each server, node by node, with the same number of servers on every node.

    Raises:
        ConfigError: the wanted number does not fit. `setting` names it.
    """
    if not slots.nodes:
        return []
    per_server = slots.nodes_per_server
    spans = [slots.nodes[start : start + per_server] for start in range(0, len(slots.nodes), per_server)]
    fitting = max(1, len(slots.gpus) // slots.tp_size) if slots.gpus else max(1, slots.wanted // len(spans))
    per_span, left = divmod(slots.wanted or fitting * len(spans), len(spans))
    if left or per_span > fitting:
        raise ConfigError(
            f"{setting}: expected {f'a multiple of {len(spans)}, ' * (len(spans) > 1)}at most {fitting * len(spans)} "
            f"servers of {slots.tp_size} GPUs on {len(slots.gpus)} GPUs of {len(slots.nodes)} nodes, got {slots.wanted}"
        )
    return [_places(slots, span, index) for span in spans for index in range(per_span)]


def _places(slots: Slots, span: tuple[int, ...], index: int) -> tuple[Place, ...]:
    """Returns the places of server `index` of the nodes `span`."""
    first = span[0]
    if not slots.gpus:
        return (Place(first, None),) * slots.tp_size
    if len(span) > 1:
        return tuple(Place(node, gpu) for node in span for gpu in slots.gpus)
    start = index * slots.tp_size
    return tuple(Place(first, gpu) for gpu in slots.gpus[start : start + slots.tp_size])
