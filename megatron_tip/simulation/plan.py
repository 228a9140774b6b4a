"""The plan of a run on a cluster: the kinds of ranks that differ, simulated, and the time of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.planning.memory_estimate import has_servers_beside
from megatron_tip.planning.plan import Outline, outline_run
from megatron_tip.simulation.assumptions import AssumedSelection, assumed_rollouts
from megatron_tip.simulation.device import Device
from megatron_tip.simulation.rank import SimulatedRank, simulate_rank, step_batch
from megatron_tip.teachers.setup import teacher_kind

PASSES = ("teacher", "score", "train")
"""The phases that go through a pipeline."""
PHASES = ("teacher", "score", "select", "train", "sync")


@dataclass(frozen=True)
class RankKind:
    """Ranks that do the same: `rank` stands for `count` of them. `stages`: of student and teacher, in words."""

    rank: int
    stages: str
    count: int
    has_server: bool


@dataclass(frozen=True)
class PlannedRank:
    """A kind of rank in one batch. `server_bytes`: of SGLang on the same GPU. `seconds`: by phase, messages included."""

    kind: RankKind
    batch: str
    simulated: SimulatedRank
    server_bytes: float
    seconds: dict[str, float]

    @property
    def peak_phase(self) -> str:
        peaks = self.simulated.ledger.peaks
        return max(peaks, key=lambda phase: peaks[phase].total)

    @property
    def peak_bytes(self) -> float:
        return self.simulated.ledger.peaks[self.peak_phase].total + self.server_bytes


@dataclass(frozen=True)
class Plan:
    """What `megatron-tip plan` found. `notes`: what could not be checked here, or is assumed."""

    device: Device
    world_size: int
    gpus_per_node: int
    outline: Outline
    ranks: list[PlannedRank]
    num_response_tokens: dict[str, int]
    notes: list[str]

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0

    @property
    def missing_bytes(self) -> float:
        """By how much the fullest GPU exceeds its memory, less a tenth for CUDA, NCCL and fragmentation."""
        return max(rank.peak_bytes for rank in self.ranks) - 0.9 * self.device.memory_gib * 2**30

    def phase_seconds(self, batch: str) -> dict[str, float]:
        """Returns the time of each phase on its slowest rank, without generation."""
        own = [rank for rank in self.ranks if rank.batch == batch]
        return {phase: max(rank.seconds.get(phase, 0.0) for rank in own) for phase in PHASES}

    def bubble(self, batch: str) -> float:
        """Returns the share of the training pass in which a stage waits for its first or after its last micro-batch."""
        stages = self.outline.student_grid.pp_size - 1
        counts = [rank.simulated.num_trained for rank in self.ranks if rank.batch == batch]
        return stages / (max(counts) + stages)


def make_plan(
    config: Config, world_size: int, device: Device, *, gpus_per_node: int, batches: Sequence[str] = ("longest", "typical")
) -> Plan:
    """Returns the plan of a run on `world_size` GPUs. Needs no weights and no GPU.

    Raises:
        ConfigError: the run would be refused, or its teacher is behind servers. For other errors see `outline_run`.
    """
    if not teacher_kind(config).has_weights:
        raise ConfigError('teacher.kind: expected "megatron" for a plan, got "sglang"; use train --dry-run')
    machine = Machine(is_elsewhere=True)
    config, assumed_settings = as_simulated(config, on_gpu=device.name != "cpu")
    outline = outline_run(config, world_size, machine)
    if outline.selector.selects_in_one_pass(None) or outline.selector.thresholds == "last_step":
        raise ConfigError("selection: expected a separate scoring pass for a plan; use train --dry-run")
    kinds = rank_kinds(config, outline)
    ranks: list[PlannedRank] = []
    tokens = {}
    for name in batches:
        batch = step_batch(config, outline, assumed_rollouts(config, longest=name == "longest"))
        tokens[name] = batch.num_valid()
        assumed = AssumedSelection.of(outline.selector, batch)
        metrics = None
        for kind in kinds:
            simulated = simulate_rank(config, outline, kind.rank, batch, assumed, metrics=metrics)
            metrics = metrics or simulated.metrics
            server = server_bytes(config, device) if kind.has_server else 0.0
            seconds = seconds_of(simulated, outline, device, gpus_per_node)
            ranks.append(PlannedRank(kind, name, simulated, server, seconds))
    return Plan(device, world_size, gpus_per_node, outline, ranks, tokens, [*machine.notes, *assumed_settings])


def as_simulated(config: Config, *, on_gpu: bool) -> tuple[Config, list[str]]:
    """Returns the configuration as it is simulated, and what that changes."""
    sections = config.model_dump()
    notes = ["layers: torch's own, with fused attention; Transformer Engine's keep about as much"]
    for name in ("model", "teacher"):
        if sections[name]["dtype"] == "auto" and on_gpu:
            sections[name]["dtype"] = "bfloat16"
        sections[name]["transformer_impl"] = "local"
    sections["tracking"]["view_every_steps"] = 0
    sections["loss"]["compile"] = False
    return Config.model_validate(sections), notes


def rank_kinds(config: Config, outline: Outline) -> list[RankKind]:
    """Returns one rank of each kind, the rank that reports the step's metrics first.

    Ranks differ by their stage of either model (first, middle, last) and by a server on the same GPU. Where they differ
    by replica, replica 0 stands for all: it also sends its weights to the engine.
    """
    student, teacher = outline.student_grid, outline.teacher_grid
    found: dict[tuple[str, bool], list[int]] = {}
    beside = servers_beside(config, student.world_size)
    for rank in range(student.world_size):
        stages = f"student {_stage(student, rank)}, teacher {_stage(teacher, rank)}"
        found.setdefault((stages, rank in beside), []).append(rank)
    reporter = student.rank_at(tp=0, dp=0, pp=student.pp_size - 1)
    kinds = []
    for (stages, has_server), ranks in found.items():
        kinds.append(RankKind(reporter if reporter in ranks else ranks[0], stages, len(ranks), has_server))
    return sorted(kinds, key=lambda kind: (kind.rank != reporter, kind.rank))


def servers_beside(config: Config, world_size: int) -> set[int]:
    """Returns the ranks that share their GPU with a server of the run's own."""
    if not has_servers_beside(config, world_size):
        return set()
    if config.sglang.gpus:
        return {gpu for gpu in config.sglang.gpus if gpu < world_size}
    return set(range(min(world_size, config.rollout.servers * config.sglang.tensor_parallel_size)))


def server_bytes(config: Config, device: Device) -> float:
    """Returns the memory that a server takes on its GPU."""
    return config.sglang.memory_fraction * device.memory_gib * 2**30


def seconds_of(simulated: SimulatedRank, outline: Outline, device: Device, gpus_per_node: int) -> dict[str, float]:
    """Returns the time of each phase on one rank: arithmetic, messages, and waiting in the pipeline."""
    ledger, seconds = simulated.ledger, {}
    for phase in PHASES:
        traffic = [
            device.seconds_of_traffic(_over_its_link(route), amount, gpus_per_node=gpus_per_node)
            for route, amount in ledger.traffic.items()
            if route.phase == phase
        ]
        busy = device.seconds_of(ledger.work[phase]) + sum(traffic)
        grid = outline.teacher_grid if phase == "teacher" else outline.student_grid
        counts = {"teacher": simulated.num_taught, "score": simulated.num_scored, "train": simulated.num_trained}
        count = counts.get(phase, 0)
        seconds[phase] = busy * (count + grid.pp_size - 1) / count if count else busy
    return seconds


def _over_its_link(route: object) -> object:
    return route


def _stage(grid: ModelGrid, rank: int) -> str:
    place = grid.coordinates(rank)[2]
    if grid.pp_size == 1:
        return "whole"
    return "first" if place == 0 else "last" if place == grid.pp_size - 1 else "middle"


__all__ = ["Plan", "PlannedRank", "RankKind", "make_plan", "rank_kinds", "replace"]
