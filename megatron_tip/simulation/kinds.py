"""The kinds of ranks of a world: one stands for all that do the same."""

from dataclasses import dataclass

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.planning.beside import EngineMemory
from megatron_tip.planning.phases import OFFLOADED, PHASES
from megatron_tip.planning.plan import Outline
from megatron_tip.rollout.engine import CACHE
from megatron_tip.simulation.device import Device

MEMORY_PHASES = {
    "rollout": "generate",
    "teacher": "ask",
    "score": "score",
    "select": "score",
    "train": "train",
    "update": "update",
    "sync": "sync",
    "measure": "measure",
}
"""The phases of a step and of a held-out measurement, with their names in `planning.phases.PHASES`."""

PURPOSES = {
    "teacher": "teacher: weights",
    "head": "teacher: head",
    "gradients": "student: gradients",
    "optimizer": "student: optimizer",
}
"""What may leave the device, by its name in `planning.phases.OFFLOADED`: its purpose in an account."""

SERVER, ENGINE = "SGLang server", "embedded engine"


@dataclass(frozen=True)
class RankKind:
    """Ranks that do the same: `rank` stands for `count` of them. `stages`: of student and teacher, in words, and which
    part of its sequences the rank has.

    `beside`: what shares their GPU: `SERVER`, `ENGINE` or "".
    """

    rank: int
    stages: str
    count: int
    beside: str

    def __str__(self) -> str:
        """Returns the kind in words."""
        return f"{self.stages}{f', {self.beside}' if self.beside else ''} ({self.count})"


def rank_kinds(config: Config, outline: Outline, batch: StepBatch) -> list[RankKind]:
    """Returns one rank of each kind, the rank that reports the step's metrics first.

    Ranks differ by their stage of either model (first, middle, last) and by what shares their GPU. Under context
    parallelism the ranks with the first part of each sequence, which has the prompt, differ from the others; of these
    the one with the most rows of `batch` stands for all. Where ranks differ by replica, replica 0 stands for all: it
    also sends its weights to the engine.
    """
    student, teacher = outline.student_grid, outline.teacher_grid
    architectures = outline.student.architecture, outline.teaching.architecture
    found: dict[tuple[str, str], list[int]] = {}
    beside = beside_ranks(config, outline)
    for rank in range(student.world_size):
        own, other = (_stage(grid, rank, one) for grid, one in zip((student, teacher), architectures, strict=True))
        stages = f"student {own}, teacher {other}"
        if student.cp_size > 1:
            stages += f", {'first' if student.coordinates(rank).cp == 0 else 'another'} part of each sequence"
        found.setdefault((stages, beside.get(rank, "")), []).append(rank)
    reporter = student.rank_at(tp=0, dp=0, pp=student.pp_size - 1)
    rows = [sum(counts) for counts in batch.num_rows()[: student.cp_size]]  # of replica 0

    def of_replica_0(rank: int) -> tuple[bool, int]:
        place = student.coordinates(rank)
        return place.dp == 0, rows[place.cp]

    kinds = []
    for (stages, neighbour), ranks in found.items():
        fullest = max(ranks, key=of_replica_0)
        kinds.append(RankKind(reporter if reporter in ranks else fullest, stages, len(ranks), neighbour))
    return sorted(kinds, key=lambda kind: (kind.rank != reporter, kind.rank))


def beside_ranks(config: Config, outline: Outline) -> dict[int, str]:
    """Returns what shares a rank's GPU, for the ranks that do not have it alone."""
    if config.rollout.engine == "embedded":
        return {0: ENGINE}
    servers = [server for server in outline.placement.servers if server.memory_saver]
    return {rank: SERVER for server in servers for rank in server.sharers if rank is not None}


def beside_bytes(config: Config, outline: Outline, device: Device, kind: RankKind, phase: str) -> float:
    """Returns the bytes in a phase of what shares the GPU of `kind`.

    The embedded engine always has its weights, and a cache while it generates.
    """
    engine, held = EngineMemory.of(config, outline, on_gpu=True), PHASES[_memory_phase(config, phase)].servers
    if kind.beside == ENGINE:
        return engine.weight_bytes + (engine.embedded_cache_bytes(config) if CACHE in held else 0.0)
    return engine.server_bytes(config, outline, held, device.memory_bytes) if kind.beside == SERVER else 0.0


def offloaded(config: Config, phase: str) -> list[str]:
    """Returns the purposes that are in host memory during a phase."""
    needed = PHASES[_memory_phase(config, phase)].trainer
    return [PURPOSES[name] for name in sorted(OFFLOADED[config.training.offload]) if name not in needed]


def _memory_phase(config: Config, phase: str) -> str:
    """Returns the name in `PHASES`. A checkpoint moves nothing: it comes after a measurement or a sync."""
    if phase == "save":
        return "measure" if config.heldout.num_prompts else "sync"
    return MEMORY_PHASES[phase]


def _stage(grid: ModelGrid, rank: int, model: ModelArchitecture) -> str:
    place = grid.coordinates(rank).pp
    if grid.pp_size == 1:
        return "whole"
    name = "first" if place == 0 else "last" if place == grid.pp_size - 1 else "middle"
    name += f" of {grid.pipeline_layers[place]} layers" if grid.pipeline_layers else ""
    if model.experts is None or not model.experts.dense_layers:
        return name
    with_experts = sum(map(model.has_experts, grid.layers_of_stages(model.num_layers)[place]))
    return f"{name}, {with_experts} layers with experts"
