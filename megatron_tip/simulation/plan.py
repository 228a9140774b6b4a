"""The plan of a run on a cluster: the kinds of ranks that differ, simulated, and the time of a step."""

from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.machine import Machine
from megatron_tip.placement.hosts import Hosts
from megatron_tip.placement.placement import num_workers_on
from megatron_tip.planning.memory_estimate import GATHERED_BYTES, optimizer_shards
from megatron_tip.planning.passes import OnePass, plan_passes
from megatron_tip.planning.plan import Outline, outline_run
from megatron_tip.records import Rollout
from megatron_tip.simulation.account import Account
from megatron_tip.simulation.assumptions import AssumedSelection, assumed_rollouts
from megatron_tip.simulation.device import Device, crosses_nodes
from megatron_tip.simulation.kinds import RankKind, beside_bytes, offloaded, rank_kinds
from megatron_tip.simulation.layers import CountedRank, count_rank
from megatron_tip.simulation.ledger import EXCHANGE
from megatron_tip.simulation.parts import ACTIVATIONS, OF_ROWS, ROWS_SENT
from megatron_tip.simulation.processes import other_processes
from megatron_tip.simulation.rank import step_batch
from megatron_tip.simulation.supported import check_simulated
from megatron_tip.simulation.timing import (
    PER_TOKEN,
    STEP_PHASES,
    Generation,
    generation_of,
    message_scale,
    seconds_of,
)

TYPICAL = "typical"
BATCHES = ("longest", TYPICAL)
_LAYERS_NOTE = "Transformer Engine's layers: torch's own, with fused attention, are simulated in their place"


@dataclass(frozen=True)
class PlannedRank:
    """A kind of rank in one batch.

    `live`: bytes by phase and purpose at the phase's peak, of a whole step, with what shares the GPU, without what is
    in host memory. `scale`: tokens of the step over those simulated, a few micro-batches. `num_trained`: of these
    micro-batches. `seconds`: by phase, messages and waiting in the pipeline included.
    """

    kind: RankKind
    batch: str
    account: Account
    live: dict[str, dict[str, float]]
    scale: float
    num_trained: int
    seconds: dict[str, float]
    workers_per_node: int

    @property
    def peak_phase(self) -> str:
        """The phase with the most live bytes."""
        return max(self.live, key=lambda phase: sum(self.live[phase].values()))

    @property
    def peak_bytes(self) -> float:
        """The most bytes that live at once on this GPU."""
        return sum(self.live[self.peak_phase].values())

    def flops(self, phase: str) -> float:
        """Returns the phase's floating-point operations in matrix products and attention."""
        return self.account.work(phase).matrix_flops * (self.scale if phase in PER_TOKEN else 1)

    def message_bytes(self) -> dict[tuple[str, str, bool], float]:
        """Returns the bytes of a step's messages, both ways, by phase, group and whether they leave their node."""
        found: dict[tuple[str, str, bool], float] = {}
        for route, traffic in self.account.traffic().items():
            if route.phase not in STEP_PHASES or len(route.ranks) < 2:
                continue
            key = (route.phase, route.group, crosses_nodes(route, self.workers_per_node))
            found[key] = found.get(key, 0.0) + traffic.num_bytes * message_scale(route, self.scale)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Plan:
    """What `megatron-tip plan` found. `notes`: what could not be checked here, or is assumed."""

    config: Config
    device: Device
    outline: Outline
    ranks: list[PlannedRank]
    generation: dict[str, Generation]
    notes: list[str]

    @property
    def hosts(self) -> Hosts:
        return self.outline.placement.hosts

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0

    @property
    def missing_bytes(self) -> float:
        """The bytes that the fullest GPU lacks, with what is set aside left free."""
        return self.fullest.peak_bytes - self.device.usable_bytes

    @property
    def fullest(self) -> PlannedRank:
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    def phase_seconds(self, batch: str) -> dict[str, float]:
        """Returns the time of each phase on its slowest rank, without generation."""
        own = [rank for rank in self.ranks if rank.batch == batch]
        return {phase: max(rank.seconds[phase] for rank in own) for phase in STEP_PHASES}

    def step_seconds(self, batch: str) -> float:
        """Returns the time of a step; a batch that is generated ahead overlaps with the training of the one before."""
        training, generating = sum(self.phase_seconds(batch).values()), self.generation[batch].seconds
        return max(training, generating) if self.config.rollout.ahead else training + generating

    def gpu_hours(self, batch: str) -> float:
        """Returns the time of all steps on all GPUs of the nodes."""
        gpus = len(self.hosts.gpus) * self.hosts.nodes
        return self.step_seconds(batch) * self.config.training.steps * gpus / 3600

    def bubble(self, batch: str) -> float:
        """Returns the share of the training pass in which a stage waits for its first or after its last micro-batch."""
        stages = self.outline.student_grid.pp_size - 1
        counts = [rank.num_trained * rank.scale for rank in self.ranks if rank.batch == batch]
        return stages / (max(counts) + stages)


def planned_hosts(config: Config, nodes: int, gpus_per_node: int) -> Hosts:
    """Returns training nodes whose GPUs all have a rank, except those that servers have for themselves."""
    workers = num_workers_on(config, gpus_per_node)
    return Hosts(nodes * workers, workers, tuple(range(gpus_per_node)), by_job=True)


def make_plan(
    config: Config, hosts: Hosts, device: Device, *, batches: Sequence[str] = BATCHES, num_processes: int = 1
) -> Plan:
    """Returns the plan of a run on `hosts`. Needs no weights and no GPU.

    Args:
        num_processes: above 1, other processes plan all batches but the last.

    Raises:
        ConfigError: the run would be refused, or the simulation lacks a part of it. For other errors see `outline_run`.
    """
    machine = Machine(is_elsewhere=True)
    outline = outline_run(config, hosts.workers, machine, hosts)
    check_simulated(config)
    *others, last = batches
    if others and num_processes > 1:
        with other_processes(min(num_processes - 1, len(others))) as processes:
            calls = [processes.submit(_planned_elsewhere, config, hosts, device, name) for name in others]
            own = _planned_batch(config, outline, device, last)
            try:
                planned = [*(call.result() for call in calls), own]
            except BrokenProcessPool:  # ended by the system, as for want of memory
                planned = [*(_planned_batch(config, outline, device, name) for name in others), own]
    else:
        planned = [_planned_batch(config, outline, device, name) for name in batches]
    generation = {name: generated for name, (_, generated) in zip(batches, planned, strict=True)}
    ranks = [rank for own_ranks, _ in planned for rank in own_ranks]
    notes = [*machine.notes, *_assumed_notes(config, outline)]
    return Plan(as_simulated(config), device, outline, ranks, generation, notes)


def _assumed_notes(config: Config, outline: Outline) -> list[str]:
    """Returns what this run is assumed to do that a real one may do otherwise."""
    found = [_LAYERS_NOTE]
    if max(outline.student_grid.cp_size, outline.teacher_grid.cp_size) > 1:
        found.append("context parallelism: keys and values are gathered; Transformer Engine passes them in a ring")
    if any(model.architecture.experts for model in (outline.student, outline.teaching)):
        found.append(
            "experts: all get equally many tokens, and are computed one after another; Transformer Engine groups their "
            "products"
        )
    if config.rollout.environment:
        found.append("rollout.environment: its own tokens count as generated ones")
    return found


def _planned_elsewhere(config: Config, hosts: Hosts, device: Device, name: str) -> tuple[list[PlannedRank], Generation]:
    """Returns `_planned_batch` in another process, which reads the outline itself."""
    outline = outline_run(config, hosts.workers, Machine(is_elsewhere=True), hosts)
    return _planned_batch(config, outline, device, name)


def _planned_batch(config: Config, outline: Outline, device: Device, name: str) -> tuple[list[PlannedRank], Generation]:
    """Returns the kinds of ranks in one batch, simulated, and the batch's generation."""
    config = as_simulated(config)
    one_pass = plan_passes(config, outline, memory_gib=device.memory_gib, on_gpu=True)
    rollouts = assumed_rollouts(config, longest=name == "longest")
    batch, scale, takes_one_pass = shortened(config, outline, one_pass, rollouts, longest=name == "longest")
    assumed = AssumedSelection.of(outline.selector, batch, takes_one_pass=takes_one_pass)
    kinds = rank_kinds(config, outline, batch)
    counted = _counted(config, outline, kinds, batch, assumed, device.memory_bytes)
    ranks = [_planned(config, outline, device, kind, name, counted[kind.stages], scale) for kind in kinds]
    return ranks, generation_of(config, outline, device, rollouts)


def _counted(
    config: Config,
    outline: Outline,
    kinds: Sequence[RankKind],
    batch: StepBatch,
    assumed: AssumedSelection,
    gpu_memory_bytes: float,
) -> dict[str, CountedRank]:
    """Returns the account of a rank by its stages; what shares its GPU changes nothing in the simulation."""
    found: dict[str, CountedRank] = {}
    for kind in kinds:
        if kind.stages not in found:
            metrics = next((one.metrics for one in found.values()), None)
            found[kind.stages] = count_rank(
                config, outline, kind.rank, batch, assumed, metrics=metrics, gpu_memory_bytes=gpu_memory_bytes
            )
    return found


def _planned(
    config: Config, outline: Outline, device: Device, kind: RankKind, batch: str, counted: CountedRank, scale: float
) -> PlannedRank:
    live = live_bytes(config, outline, device, kind, counted.account, scale)
    seconds = seconds_of(config, outline, device, counted, scale)
    per_node = outline.placement.hosts.workers_per_node
    return PlannedRank(kind, batch, counted.account, live, scale, counted.num_trained, seconds, per_node)


def live_bytes(
    config: Config, outline: Outline, device: Device, kind: RankKind, account: Account, scale: float
) -> dict[str, dict[str, float]]:
    """Returns the bytes of each phase by purpose, of a whole step: with what shares the GPU, without what left it."""
    phases = own_bytes(config, outline, account, scale)
    for phase, parts in phases.items():
        for purpose in offloaded(config, phase):
            parts.pop(purpose, None)
        if beside := beside_bytes(config, outline, device, kind, phase):
            parts[kind.beside] = beside
    return phases


def own_bytes(config: Config, outline: Outline, account: Account, scale: float) -> dict[str, dict[str, float]]:
    """Returns the rank's own bytes of each phase by purpose, simulated and scaled to a step, if nothing leaves the GPU.

    A held-out measurement runs the passes of the teacher and the scoring on its own rollouts, with both models on the
    device; a checkpoint gathers a piece of the optimizer's state at a time.
    """
    phases = {phase: _scaled(account.live(phase), scale) for phase in ("rollout", *STEP_PHASES)}
    held = account.left("score").get(ACTIVATIONS, 0.0)  # the outputs that one pass keeps of every micro-batch
    for phase in ("score", "select", "train") if held else ():
        phases[phase][ACTIVATIONS] = phases[phase].get(ACTIVATIONS, 0.0) + (scale - 1) * held
    phases["teacher"] = _asking(account, scale)
    if config.heldout.num_prompts:
        measured = scale * config.heldout.num_prompts / config.rollout.prompts_per_step
        measured /= config.rollout.samples_per_prompt
        scored = account.live("measure") or account.live("score")
        phases["measure"] = max(_asking(account, measured), _scaled(scored, measured), key=_total)
    shards = optimizer_shards(config, outline.student_grid)
    piece = {"save: a piece of the optimizer": float(shards * GATHERED_BYTES)} if shards > 1 else {}
    phases["save"] = phases["rollout"] | piece
    return phases


def _asking(account: Account, scale: float) -> dict[str, float]:
    """Returns the bytes by purpose while the teacher answers: in its last passes, or while rows are exchanged."""
    exchange, passes = account.live(EXCHANGE), account.live("teacher")
    # While micro-batches pass, the rows of those before are among the activations.
    more = max(0.0, scale - 1) * exchange.get(ROWS_SENT, 0.0)
    return max(passes | ({ROWS_SENT: more} if more else {}), _scaled(exchange, scale), key=_total)


def _scaled(parts: dict[str, float], scale: float) -> dict[str, float]:
    return {name: size * (scale if name in OF_ROWS else 1) for name, size in parts.items()}


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def as_simulated(config: Config) -> Config:
    """Returns the configuration as it is simulated."""
    sections = config.model_dump()
    for name in ("model", "teacher"):
        if sections[name]["dtype"] == "auto":
            sections[name]["dtype"] = "bfloat16"
        sections[name]["transformer_impl"] = "local"
    sections["tracking"]["view_every_steps"] = 0
    return Config.model_validate(sections)


def shortened(
    config: Config, outline: Outline, one_pass: OnePass, rollouts: Sequence[Rollout], *, longest: bool
) -> tuple[StepBatch, float, bool]:
    """Returns a batch with fewer rollouts of the same lengths, how many times more tokens the step itself has, and
    whether the step takes one pass.

    Each replica keeps enough micro-batches to fill its pipeline and one more: live activations are then those of the
    whole step, and everything else grows with the tokens, as do the activations that one pass holds.
    """
    whole = step_batch(config, outline, rollouts)
    grid = outline.student_grid
    in_flight = max(grid.pp_size, outline.teacher_grid.pp_size) + 1
    each = max(len(places) for replica in whole.plan for places in replica)
    count = min(len(rollouts), grid.dp_size * each * in_flight)
    takes_one_pass = one_pass.suits(whole)
    if count == len(rollouts):
        return whole, 1.0, takes_one_pass
    kept = assumed_rollouts(config, longest=longest, count=count)
    short = step_batch(config, outline, kept)
    return short, whole.num_model_tokens() / short.num_model_tokens(), takes_one_pass
