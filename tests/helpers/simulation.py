"""Tiny runs whose step is simulated and measured, to compare the two."""

from pathlib import Path
from typing import Any

from megatron_tip.config import Config
from megatron_tip.machine import Machine
from megatron_tip.planning.passes import plan_passes
from megatron_tip.planning.plan import Outline, outline_run
from megatron_tip.simulation.assumptions import AssumedSelection, assumed_rollouts
from megatron_tip.simulation.rank import SimulatedRank, simulate_rank, step_batch
from tests.helpers.measured_rank import measure_rank, peaks_of, traffic_of
from tests.helpers.training import Layout, make_config, this_worker

# A rule whose choice depends on neither model, so that both runs train on the same rows.
SECTIONS: dict[str, dict[str, Any]] = {
    "rollout": {"prompts_per_step": 8, "max_response_tokens": 64},
    "selection": {"rule": "random", "retention_ratio": 0.3},
    "training": {"steps": 4, "max_tokens_per_micro_batch": 200},
    "optimizer": {"lr": 1e-3, "clip_grad": 1.0},
}
LAYOUTS = {
    "1x1x1": Layout(1),
    "3x1x1": Layout(3, (3, 1), (3, 1), sequence_parallel=True),
    "1x2x1": Layout(2, (1, 2), (2, 1)),
    "2x1x2": Layout(4, (2, 1), (1, 2)),
}


def configured(name: str, models: Path) -> Config:
    """The run of a layout, one of them in one pass.

    One replica also scores, for importance weights, which this rule does not need itself. Over several replicas, the
    rounds of a search for quantiles depend on the statistics, which are assumed.
    """
    scores = {} if name == "2x1x2" else {"rollout": SECTIONS["rollout"] | {"importance_cap": 2.0}}
    passes = {"selection": SECTIONS["selection"] | {"passes": "one" if name == "1x1x1" else "two"}}
    return make_config(models, LAYOUTS[name], **SECTIONS | scores | passes)


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


def measured(config: Config) -> tuple[dict[str, int], dict[Any, tuple[float, float]], float]:
    """This worker's peaks, messages and floating-point operations in the same step. Call it inside `run_workers`."""
    ledger = measure_rank(config, this_worker(), assumed_rollouts(config, longest=False))
    return peaks_of(ledger), traffic_of(ledger), sum(work.matrix_flops for work in ledger.work.values())
