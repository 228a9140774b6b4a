"""The devices that a plan can assume, and the time that work and messages take on one.

The model is first-order: nothing overlaps, matrix products run at a share of the peak, everything else at a share of
the memory's bandwidth, and no phase is faster than its operations can be started.
"""

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_tip.errors import ConfigError
from megatron_tip.planning.memory_estimate import UNCOUNTED_SHARE
from megatron_tip.simulation.ledger import Route, Traffic, Work

_TABLE = Path(__file__).with_name("devices.toml")


@dataclass(frozen=True)
class Device:
    """A GPU and its links; for the units see devices.toml. `source`: where the values are from."""

    name: str
    tflops: float
    memory_gib: float
    memory_tb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    source: str
    host_gb_per_s: float = 25.0
    link_latency_us: float = 10.0
    network_latency_us: float = 25.0
    launch_us: float = 5.0
    matrix_share: float = 0.6
    memory_share: float = 0.75
    link_share: float = 0.75

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * 2**30

    @property
    def usable_bytes(self) -> float:
        """The memory without what is set aside because nothing counts it."""
        return (1 - UNCOUNTED_SHARE) * self.memory_bytes

    def seconds_of(self, work: Work) -> float:
        """Returns the time of a phase's arithmetic, while which the host starts the next operations."""
        matrix = work.matrix_flops / (self.tflops * 1e12 * self.matrix_share)
        memory = work.memory_bytes / (self.memory_tb_per_s * 1e12 * self.memory_share)
        starting = work.num_operations * self.launch_us * 1e-6
        return max(matrix + memory, starting)

    def seconds_of_traffic(self, route: Route, traffic: Traffic, *, workers_per_node: int) -> float:
        """Returns the time of the messages of one route, by ring algorithms over the slowest of its links."""
        within = not crosses_nodes(route, workers_per_node)
        bandwidth = (self.link_gb_per_s if within else self.network_gb_per_s) * 1e9 * self.link_share
        latency = (self.link_latency_us if within else self.network_latency_us) * 1e-6
        size = len(route.ranks)
        if route.peer is None and size < 2:
            return 0.0
        passes = {"all_reduce": 2 * (size - 1) / size, "broadcast": 1.0, "gather": 1.0}
        share = 1.0 if route.peer is not None else passes.get(route.operation, (size - 1) / size)
        return traffic.num_messages * latency + share * traffic.num_bytes / bandwidth


def crosses_nodes(route: Route, workers_per_node: int) -> bool:
    """Returns whether a message leaves a node; consecutive ranks share one."""
    return len({rank // workers_per_node for rank in route.ranks}) > 1


def find_device(name: str) -> Device:
    """Returns a known device, or the one that a TOML file describes.

    Raises:
        ConfigError: neither is there, or the file lacks a value.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.exists():
            raise ConfigError(f"--gpu: expected an existing file, got {name}")
        table = _read(path)
        if len(table) != 1:
            raise ConfigError(f"{name}: expected one table, [name], got {len(table)}")
        ((name, values),) = table.items()
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected one table, [name], got the key {name} outside of any")
        return _device(name, values, str(path))
    known = _read(_TABLE)
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"--gpu: expected one of {', '.join(known)}, or a TOML file that describes another (its form is that of "
            f"{_TABLE.name}, see docs/plan.md), got {name!r}; the nearest known name is {near!r}"
        )
    return _device(name.lower(), known[name.lower()], _TABLE.name)


def _read(path: Path) -> dict[str, dict[str, float | str]]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a TOML file, got: {error}") from error


def _device(name: str, values: dict[str, float | str], where: str) -> Device:
    names = {one.name for one in fields(Device)} - {"name"}
    needed = {"tflops", "memory_gib", "memory_tb_per_s", "link_gb_per_s", "network_gb_per_s", "source"}
    if unknown := sorted(values.keys() - names):
        raise ConfigError(f"{where}: expected the keys {', '.join(sorted(names))}, got {unknown[0]}")
    if missing := sorted(needed - values.keys()):
        raise ConfigError(f"{where}: expected a value for {missing[0]} of {name}, found none")
    for key, value in values.items():
        if key != "source" and (not isinstance(value, int | float) or not value > 0):
            raise ConfigError(f"{where}: expected a number above 0 for {key} of {name}, got {value!r}")
    return Device(name=name, **values)  # pyright: ignore[reportArgumentType]: checked above
