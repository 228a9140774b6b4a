"""The plan of a run on a cluster: the kinds of ranks that differ, simulated, and the time of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.conversion.model_size import layer_parameters
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.memory_estimate import has_servers_beside
from megatron_tip.planning.plan import Outline, outline_run
from megatron_tip.records import Rollout
from megatron_tip.simulation.assumptions import AssumedSelection, assumed_rollouts
from megatron_tip.simulation.device import Device, crosses_nodes
from megatron_tip.simulation.ledger import Route
from megatron_tip.simulation.rank import SimulatedRank, simulate_rank, step_batch
from megatron_tip.teachers.setup import teacher_kind

PASSES = ("teacher", "score", "train")
"""The phases that go through a pipeline."""
PHASES = ("teacher", "score", "select", "train", "update", "sync")
BATCHES = ("longest", "typical")
PER_TOKEN = ("teacher", "score", "select", "train")
"""The phases whose work grows with the tokens of a step."""


@dataclass(frozen=True)
class RankKind:
    """Ranks that do the same: `rank` stands for `count` of them. `stages`: of student and teacher, in words."""

    rank: int
    stages: str
    count: int
    has_server: bool


TEACHER_ROWS = "teacher: rows of a step"
"""The purpose whose bytes grow with the rows of a step; others belong to a few micro-batches, or are small."""


@dataclass(frozen=True)
class PlannedRank:
    """A kind of rank in one batch.

    `scale`: tokens of the step over those simulated, a few micro-batches. `server_bytes`: of SGLang on the same GPU.
    `seconds`: by phase, messages and waiting in the pipeline included.
    """

    kind: RankKind
    batch: str
    simulated: SimulatedRank
    scale: float
    server_bytes: float
    seconds: dict[str, float]
    gpus_per_node: int

    @property
    def peak_phase(self) -> str:
        """The phase with the most live bytes."""
        return max(self.simulated.ledger.peaks, key=lambda phase: sum(self.parts(phase).values()))

    @property
    def peak_bytes(self) -> float:
        """The most bytes that live at once on this GPU."""
        return sum(self.parts(self.peak_phase).values())

    def parts(self, phase: str) -> dict[str, float]:
        """Returns the bytes at the phase's peak by purpose, of a whole step."""
        parts: dict[str, float] = dict(self.simulated.ledger.peaks[phase].parts)
        if TEACHER_ROWS in parts:
            parts[TEACHER_ROWS] *= self.scale
        return parts | ({"SGLang server": self.server_bytes} if self.server_bytes else {})

    def flops(self, phase: str) -> float:
        """Returns the phase's floating-point operations in matrix products and attention."""
        return self.simulated.ledger.work[phase].matrix_flops * (self.scale if phase in PER_TOKEN else 1)

    def bytes_sent(self) -> dict[tuple[str, str, bool], float]:
        """Returns the bytes of a step's messages by phase, group and whether they leave their node."""
        found: dict[tuple[str, str, bool], float] = {}
        for route, traffic in self.simulated.ledger.traffic.items():
            if route.phase not in PHASES or len(route.ranks) < 2:
                continue
            key = (route.phase, route.group, crosses_nodes(route, self.gpus_per_node))
            found[key] = found.get(key, 0.0) + traffic.num_bytes * message_scale(route, self.scale)
        return found


@dataclass(frozen=True)
class Generation:
    """The generation of a step's rollouts by `num_servers` engines."""

    num_tokens: int
    num_servers: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What `megatron-tip plan` found. `notes`: what could not be checked here, or is assumed."""

    config: Config
    device: Device
    world_size: int
    gpus_per_node: int
    outline: Outline
    ranks: list[PlannedRank]
    generation: dict[str, Generation]
    notes: list[str]

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0

    @property
    def missing_bytes(self) -> float:
        """The bytes that the fullest GPU lacks, with a tenth of it left for CUDA, NCCL and fragmentation."""
        return max(rank.peak_bytes for rank in self.ranks) - 0.9 * self.device.memory_gib * 2**30

    def phase_seconds(self, batch: str) -> dict[str, float]:
        """Returns the time of each phase on its slowest rank, without generation."""
        own = [rank for rank in self.ranks if rank.batch == batch]
        return {phase: max(rank.seconds[phase] for rank in own) for phase in PHASES}

    def step_seconds(self, batch: str) -> float:
        """Returns the time of a step; a batch that is generated ahead overlaps with the training of the one before."""
        training, generating = sum(self.phase_seconds(batch).values()), self.generation[batch].seconds
        return max(training, generating) if self.config.rollout.ahead else training + generating

    def bubble(self, batch: str) -> float:
        """Returns the share of the training pass in which a stage waits for its first or after its last micro-batch."""
        stages = self.outline.student_grid.pp_size - 1
        counts = [rank.simulated.num_trained * rank.scale for rank in self.ranks if rank.batch == batch]
        return stages / (max(counts) + stages)


def make_plan(
    config: Config,
    world_size: int,
    device: Device,
    *,
    gpus_per_node: int,
    batches: Sequence[str] = ("longest", "typical"),
) -> Plan:
    """Returns the plan of a run on `world_size` GPUs. Needs no weights and no GPU.

    Raises:
        ConfigError: the run would be refused, or its teacher is behind servers. For other errors see `outline_run`.
    """
    if not teacher_kind(config).has_weights:
        raise ConfigError('teacher.kind: expected "megatron" for a plan, got "sglang"; use train --dry-run')
    machine = Machine(is_elsewhere=True)
    config, notes = as_simulated(config, on_gpu=device.name != "cpu")
    outline = outline_run(config, world_size, machine)
    if outline.selector.selects_in_one_pass(None) or outline.selector.thresholds == "last_step":
        raise ConfigError("selection: expected a separate scoring pass for a plan; use train --dry-run")
    kinds = rank_kinds(config, outline)
    ranks: list[PlannedRank] = []
    generation = {}
    for name in BATCHES:
        rollouts = assumed_rollouts(config, longest=name == "longest")
        generation[name] = generation_of(config, outline, device, rollouts)
        batch, scale = shortened(config, outline, rollouts, longest=name == "longest")
        assumed = AssumedSelection.of(outline.selector, batch)
        metrics = None
        for kind in kinds:
            simulated = simulate_rank(
                config, outline, kind.rank, batch, assumed, metrics=metrics, on_gpu=device.name != "cpu"
            )
            metrics = metrics or simulated.metrics
            server = server_bytes(config, device) if kind.has_server else 0.0
            seconds = seconds_of(simulated, outline, device, gpus_per_node, scale)
            ranks.append(PlannedRank(kind, name, simulated, scale, server, seconds, gpus_per_node))
    return Plan(config, device, world_size, gpus_per_node, outline, ranks, generation, [*machine.notes, *notes])


def as_simulated(config: Config, *, on_gpu: bool) -> tuple[Config, list[str]]:
    """Returns the configuration as it is simulated, and what that changes."""
    sections = config.model_dump()
    notes = ["Transformer Engine's layers: torch's own, with fused attention, are simulated in their place"]
    if config.rollout.engine == "embedded":
        notes.append("the memory of the embedded engine on the first GPU; train --dry-run estimates it")
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


def shortened(
    config: Config, outline: Outline, rollouts: Sequence[Rollout], *, longest: bool
) -> tuple[StepBatch, float]:
    """Returns a batch with fewer rollouts of the same lengths, and how much more tokens the step itself has.

    Each replica keeps enough micro-batches to fill its pipeline and one more: live activations are then those of the
    whole step, and everything else grows with the tokens.
    """
    whole = step_batch(config, outline, rollouts)
    grid = outline.student_grid
    in_flight = max(grid.pp_size, outline.teacher_grid.pp_size) + 1
    each = max(len(places) for replica in whole.plan for places in replica)
    count = min(len(rollouts), grid.dp_size * each * in_flight)
    if count == len(rollouts):
        return whole, 1.0
    kept = assumed_rollouts(config, longest=longest, count=count)
    short = step_batch(config, outline, kept)
    return short, whole.num_model_tokens() / short.num_model_tokens()


def message_scale(route: Route, scale: float) -> float:
    """Returns how many times more messages of this route a whole step has: those of its micro-batches grow."""
    is_of_pass = route.group.removeprefix("teacher ") in ("tp", "pp") or route.peer is not None
    return scale if route.phase in PASSES and is_of_pass else 1.0


def seconds_of(
    simulated: SimulatedRank, outline: Outline, device: Device, gpus_per_node: int, scale: float
) -> dict[str, float]:
    """Returns the time of each phase on one rank: arithmetic, messages, and waiting in the pipeline."""
    ledger, seconds = simulated.ledger, {}
    for phase in PHASES:
        busy = device.seconds_of(ledger.work[phase]) * (scale if phase in PER_TOKEN else 1)
        for route, traffic in ledger.traffic.items():
            if route.phase == phase:
                alone = device.seconds_of_traffic(route, traffic, gpus_per_node=gpus_per_node)
                busy += alone * message_scale(route, scale)
        grid = outline.teacher_grid if phase == "teacher" else outline.student_grid
        counts = {"teacher": simulated.num_taught, "score": simulated.num_scored, "train": simulated.num_trained}
        count = counts.get(phase, 0) * scale
        seconds[phase] = busy * (count + grid.pp_size - 1) / count if count else busy
    return seconds


def generation_of(config: Config, outline: Outline, device: Device, rollouts: Sequence[Rollout]) -> Generation:
    """Returns the time that the engines need, bound by their memory's bandwidth.

    Each token position of the longest response reads the weights once; each token also reads the keys and values of
    its context. Prompts, sampling and host time are left out. Servers given by URL count as their own GPUs.
    """
    student = outline.student.architecture
    num_servers = max(1, len(config.rollout.server_urls) or config.rollout.servers)
    if config.rollout.engine == "embedded":
        num_servers = 1
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    longest = max(len(rollout.response_ids) for rollout in rollouts)
    contexts = sum(len(one.response_ids) * (len(one.prompt_ids) + len(one.response_ids) / 2) for one in rollouts)
    itemsize = Dtypes.of(config).engine.itemsize
    cached = 2 * student.num_layers * student.num_query_groups * student.head_dim * itemsize
    weights = (student.num_layers * layer_parameters(student) + student.vocab_size * student.hidden_size) * itemsize
    split = config.sglang.tensor_parallel_size
    bandwidth = device.memory_tb_per_s * 1e12 * device.memory_share * split
    return Generation(tokens, num_servers, (longest * weights + contexts * cached / num_servers) / bandwidth)


def _stage(grid: ModelGrid, rank: int) -> str:
    place = grid.coordinates(rank)[2]
    if grid.pp_size == 1:
        return "whole"
    return "first" if place == 0 else "last" if place == grid.pp_size - 1 else "middle"
