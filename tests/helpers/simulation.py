"""Tiny runs whose step is simulated and measured, to compare the two."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tip.config import Config
from megatron_tip.machine import Machine
from megatron_tip.planning.passes import plan_passes
from megatron_tip.planning.plan import Outline, outline_run
from megatron_tip.simulation.assumptions import AssumedSelection, assumed_rollouts
from megatron_tip.simulation.experts import even_routing
from megatron_tip.simulation.kinds import MEMORY_PHASES, offloaded
from megatron_tip.simulation.ledger import BETWEEN, EXCHANGE, Ledger
from megatron_tip.simulation.rank import SimulatedRank, simulate_rank, step_batch
from megatron_tip.simulation.timing import STEP_PHASES, moved_bytes
from tests.helpers.measured_rank import by_phase, measure_rank, traffic_of
from tests.helpers.tiny import make_experts
from tests.helpers.training import Layout, make_config, make_models, this_worker

# A rule whose choice depends on neither model, so that both runs train on the same rows.
SECTIONS: dict[str, dict[str, Any]] = {
    "rollout": {"prompts_per_step": 8, "max_response_tokens": 64},
    "selection": {"rule": "random", "retention_ratio": 0.3},
    "training": {"steps": 4, "max_tokens_per_micro_batch": 200},
    "optimizer": {"lr": 1e-3, "clip_grad": 1.0},
}


@dataclass(frozen=True)
class Case:
    """A layout, what its run has besides `SECTIONS`, and whether both models have experts.

    `tolerance`: of bytes to and from experts and of operations, where replicas share experts: the simulation takes
    every replica to have as many tokens as its own.
    """

    layout: Layout
    sections: dict[str, dict[str, Any]]
    has_experts: bool = False
    tolerance: float = 0.0

    @property
    def world_size(self) -> int:
        return self.layout.world_size


TWO_REPLICAS = Layout(4, (2, 1), (1, 2))
# One replica also scores, for importance weights, which this rule does not need itself. Over several replicas, the
# rounds of a search for quantiles depend on the statistics, which are assumed.
SCORES = {"rollout": {"importance_cap": 2.0}}
DISTRIBUTED = {"optimizer": {"distributed": True}}
IN_BF16 = {"model": {"dtype": "bfloat16"}}
OWN_PROMPT = {"prompts": {"teacher_system_prompt": "Think."}}
OF_ITS_AVERAGE, OF_ITSELF = (
    {"teacher": {"kind": "self", "update": update}} | OWN_PROMPT for update in ("average", "live")
)
TWO_PARTS = {"expert_model_parallel_size": 2}
EXPERTS_IN_PARTS = dict.fromkeys(("model", "teacher"), TWO_PARTS)
EXPERTS_SPREAD = dict.fromkeys(("model", "teacher"), TWO_PARTS | {"expert_tensor_parallel_size": 1})
CASES = {
    "1x1x1": Case(Layout(1), SCORES | {"selection": {"passes": "one"}}),
    "1x1x1 offload": Case(Layout(1), SCORES | {"training": {"offload": "all"}}),
    "3x1x1": Case(Layout(3, (3, 1), (3, 1), sequence_parallel=True), SCORES),
    "3x1x1 mlp": Case(Layout(3, (3, 1), (3, 1)), SCORES | {"model": {"recompute_modules": ("mlp",)}}),
    "1x2x1": Case(Layout(2, (1, 2), (2, 1)), SCORES),
    "1x2x1 recompute": Case(Layout(2, (1, 2), (2, 1)), SCORES | {"model": {"recompute_activations": True}}),
    "2x1x2": Case(TWO_REPLICAS, {}),
    "2x1x2 distributed": Case(TWO_REPLICAS, DISTRIBUTED),
    "2x1x2 distributed offload": Case(TWO_REPLICAS, DISTRIBUTED | {"training": {"offload": "optimizer"}}),
    "1x1x1 average": Case(Layout(1), SCORES | OF_ITS_AVERAGE),
    "1x1x1 average bf16": Case(Layout(1), SCORES | OF_ITS_AVERAGE | IN_BF16),
    "2x1x1 live": Case(Layout(2, (2, 1), (2, 1)), SCORES | OF_ITSELF),
    "2x1x1 cp 2": Case(Layout(4, (2, 1), (1, 2), sequence_parallel=True, cp=(2, 1)), SCORES),
    "1x1x2 cp 2": Case(Layout(4, (1, 1), (1, 1), cp=(2, 2)), DISTRIBUTED),
    "1x1x1 experts": Case(Layout(1), SCORES | {"model": {"recompute_activations": True}}, True),
    "2x1x1 experts": Case(Layout(2, (2, 1), (2, 1), sequence_parallel=True), SCORES | EXPERTS_SPREAD, True),
    "2x2x1 experts": Case(
        Layout(4, (2, 2), (2, 1), sequence_parallel=True), SCORES | {"teacher": TWO_PARTS}, True, tolerance=0.15
    ),
    "1x1x2 experts": Case(Layout(2), DISTRIBUTED | EXPERTS_IN_PARTS, True, tolerance=0.15),
}
"""tp x pp x dp of the student, and what the optimizer shards, the backward pass runs again, or leaves the device."""


def configured(name: str, models: Path) -> Config:
    """The run of a case, whose models are made in `models`."""
    if CASES[name].has_experts:
        make_experts(models / "student", seed=1)
        make_experts(models / "teacher", seed=2, hidden_size=96)
    else:
        make_models(models)
    sections = {
        key: SECTIONS.get(key, {}) | CASES[name].sections.get(key, {}) for key in {*SECTIONS, *CASES[name].sections}
    }
    if sections.get("teacher", {}).get("kind") == "self":
        sections["teacher"] |= {"path": models / "student"} | sections.get("model", {})
    return make_config(models, CASES[name].layout, **sections)


def simulated(config: Config, world_size: int) -> list[SimulatedRank]:
    """Every rank of a typical step, simulated."""
    outline: Outline = outline_run(config, world_size, Machine(is_elsewhere=True))
    batch = step_batch(config, outline, assumed_rollouts(config, longest=False))
    one_pass = plan_passes(config, outline, memory_gib=0.0, on_gpu=False)
    assumed = AssumedSelection.of(outline.selector, batch, takes_one_pass=one_pass.suits(batch))
    grid = outline.student_grid
    reporter = grid.rank_at(tp=0, dp=0, pp=grid.pp_size - 1)
    first = simulate_rank(config, outline, reporter, batch, assumed)
    return [
        first if rank == reporter else simulate_rank(config, outline, rank, batch, assumed, metrics=first.metrics)
        for rank in range(world_size)
    ]


MOVES = {"teacher": 1, "score": 1, "train": 2, BETWEEN: 2}
"""Messages of four bytes by which ranks agree that their parts have moved, by phase; a plan leaves them out."""


@dataclass(frozen=True)
class Cost:
    """A rank's peaks by phase, messages, floating-point operations, and bytes that enter or leave the device."""

    peaks: dict[str, int]
    traffic: dict[Any, tuple[float, float]]
    flops: float
    moved: dict[str, float]


def same_traffic(found: Cost, real: Cost, tolerance: float) -> bool:
    """Whether messages are as many and as long; those to and from experts may be longer or shorter by `tolerance`."""
    if found.traffic.keys() != real.traffic.keys():
        return False
    for key, (count, num_bytes) in real.traffic.items():
        is_to_experts = key[1] == "all_to_all" and key[2].removeprefix("teacher ") in ("ep", "expert tp")
        most = tolerance * num_bytes if is_to_experts else 0.0
        if found.traffic[key][0] != count or abs(found.traffic[key][1] - num_bytes) > most:
            return False
    return True


def cost_of(ledger: Ledger, peaks: dict[str, int], moved: dict[str, float]) -> Cost:
    flops = sum(work.matrix_flops for work in ledger.work.values())
    return Cost(peaks, traffic_of(ledger), flops, {phase: size for phase, size in moved.items() if size})


def simulated_cost(config: Config, rank: SimulatedRank) -> Cost:
    """What the plan says that a rank's step costs."""
    ledger = rank.ledger
    live = ledger.peaks["rollout"].parts
    moved = {MEMORY_PHASES[phase]: moved_bytes(config, live, phase) for phase in STEP_PHASES if phase != "select"}
    away = {phase: offloaded(config, phase) for phase in ("rollout", "measure", *STEP_PHASES)}
    away[EXCHANGE] = away["teacher"]
    peaks = {
        phase: sum(size for purpose, size in peak.parts.items() if purpose not in away.get(phase, ()))
        for phase, peak in ledger.peaks.items()
    }
    cost = cost_of(ledger, by_phase(peaks), moved)
    is_alone = all(len(ranks) < 2 for label, ranks in ledger.labels.values() if label == "world")
    for phase, count in MOVES.items() if config.training.offload != "none" and not is_alone else ():
        key = (phase, "all_reduce", "world", None)
        messages, num_bytes = cost.traffic.get(key, (0, 0))
        cost.traffic[key] = (messages + count, num_bytes + 4 * count)
    return cost


def measured(config: Config) -> Cost:
    """What this worker's own step costs. Call it inside `run_workers`."""
    with even_routing(Ledger()):
        ledger, moved = measure_rank(config, this_worker(), assumed_rollouts(config, longest=False))
    peaks = {phase: peak.total for phase, peak in ledger.peaks.items()}
    return cost_of(ledger, by_phase(peaks), moved)
