"""The kinds of ranks of a world: one stands for all that do the same."""

from dataclasses import dataclass

from megatron_tip.config import Config
from megatron_tip.conversion.model_size import num_parameters
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.phases import OFFLOADED, PHASES, releases_memory
from megatron_tip.planning.plan import Outline
from megatron_tip.rollout.engine import ALL_MEMORY, CACHE, WEIGHTS
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
    """Ranks that do the same: `rank` stands for `count` of them. `stages`: of student and teacher, in words.

    `beside`: what shares their GPU: `SERVER`, `ENGINE` or "".
    """

    rank: int
    stages: str
    count: int
    beside: str

    def __str__(self) -> str:
        """Returns the kind in words."""
        return f"{self.stages}{f', {self.beside}' if self.beside else ''} ({self.count})"


def rank_kinds(config: Config, outline: Outline) -> list[RankKind]:
    """Returns one rank of each kind, the rank that reports the step's metrics first.

    Ranks differ by their stage of either model (first, middle, last) and by what shares their GPU. Where they differ by
    replica, replica 0 stands for all: it also sends its weights to the engine.
    """
    student, teacher = outline.student_grid, outline.teacher_grid
    found: dict[tuple[str, str], list[int]] = {}
    beside = beside_ranks(config, outline)
    for rank in range(student.world_size):
        stages = f"student {_stage(student, rank)}, teacher {_stage(teacher, rank)}"
        found.setdefault((stages, beside.get(rank, "")), []).append(rank)
    reporter = student.rank_at(tp=0, dp=0, pp=student.pp_size - 1)
    kinds = []
    for (stages, neighbour), ranks in found.items():
        kinds.append(RankKind(reporter if reporter in ranks else ranks[0], stages, len(ranks), neighbour))
    return sorted(kinds, key=lambda kind: (kind.rank != reporter, kind.rank))


def beside_ranks(config: Config, outline: Outline) -> dict[int, str]:
    """Returns what shares a rank's GPU, for the ranks that do not have it alone."""
    if config.rollout.engine == "embedded":
        return {0: ENGINE}
    servers = [server for server in outline.placement.servers if server.memory_saver]
    return {rank: SERVER for server in servers for rank in server.sharers if rank is not None}


def beside_bytes(config: Config, outline: Outline, device: Device, kind: RankKind, phase: str) -> float:
    """Returns the bytes in a phase of what shares the GPU of `kind`.

    A server gives back its memory as `planning.phases` says. The embedded engine always has its weights, and a cache
    while it generates.
    """
    needed, on_gpu = PHASES[_memory_phase(config, phase)].servers, device.is_gpu
    weights = engine_weight_bytes(config, outline, on_gpu=on_gpu)
    if kind.beside == ENGINE:
        sequences = min(config.rollout.batch_size, config.rollout.prompts_per_step * config.rollout.samples_per_prompt)
        cache = sequences * config.longest_sequence * cache_bytes_per_token(config, outline, on_gpu=on_gpu)
        return weights + (cache if CACHE in needed else 0.0)
    if kind.beside != SERVER:
        return 0.0
    held = needed if releases_memory(config, outline.placement) else ALL_MEMORY
    if CACHE in held:
        return outline.placement.memory_beside_trainers * device.memory_bytes
    return weights / config.sglang.tensor_parallel_size if WEIGHTS in held else 0.0


def engine_weight_bytes(config: Config, outline: Outline, *, on_gpu: bool) -> float:
    """Returns the bytes of the student's weights in an engine."""
    return float(num_parameters(outline.student.architecture) * Dtypes.of(config, on_gpu=on_gpu).engine.itemsize)


def cache_bytes_per_token(config: Config, outline: Outline, *, on_gpu: bool) -> float:
    """Returns the bytes of a token's keys and values in all layers."""
    a, itemsize = outline.student.architecture, Dtypes.of(config, on_gpu=on_gpu).engine.itemsize
    return float(2 * a.num_layers * a.num_query_groups * a.head_dim * itemsize)


def offloaded(config: Config, phase: str) -> list[str]:
    """Returns the purposes that are in host memory during a phase."""
    needed = PHASES[_memory_phase(config, phase)].trainer
    return [PURPOSES[name] for name in sorted(OFFLOADED[config.training.offload]) if name not in needed]


def _memory_phase(config: Config, phase: str) -> str:
    """Returns the name in `PHASES`. A checkpoint moves nothing: it comes after a measurement or a sync."""
    if phase == "save":
        return "measure" if config.heldout.num_prompts else "sync"
    return MEMORY_PHASES[phase]


def _stage(grid: ModelGrid, rank: int) -> str:
    place = grid.coordinates(rank)[2]
    if grid.pp_size == 1:
        return "whole"
    return "first" if place == 0 else "last" if place == grid.pp_size - 1 else "middle"
