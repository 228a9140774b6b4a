"""A plan simulates one rank of each kind for a few micro-batches, and scales these to the step."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.machine import Machine
from megatron_tip.planning.plan import outline_run
from megatron_tip.simulation.assumptions import AssumedSelection, assumed_rollouts
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.plan import PHASES, PlannedRank, RankKind, rank_kinds, seconds_of, shortened
from megatron_tip.simulation.rank import simulate_rank, step_batch
from tests.helpers.training import Layout, make_config, make_models

RECIPE = Path(__file__).parents[3] / "examples" / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"


def test_ranks_of_a_large_world_are_of_few_kinds():
    overrides = ["model.pipeline_parallel_size=4", "teacher.pipeline_parallel_size=4", "sglang.memory_fraction=0.3"]
    config = load_config(RECIPE, [*overrides, "rollout.servers=4"])
    kinds = rank_kinds(config, outline_run(config, 1024, Machine(is_elsewhere=True)))
    assert {(kind.stages, kind.has_server): kind.count for kind in kinds} == {
        ("student last, teacher last", False): 256,
        ("student first, teacher first", True): 4,
        ("student first, teacher first", False): 252,
        ("student middle, teacher middle", False): 512,
    }
    assert kinds[0].rank == 768, "the rank that reports the metrics is simulated first"
    assert kinds[-1].rank == 256, "of the middle stages, the one with the most micro-batches in flight"


@pytest.mark.timeout(900)
def test_a_few_micro_batches_scaled_to_the_step_cost_what_all_of_them_do(tmp_path: Path):
    rollout = {"prompts_per_step": 12, "max_response_tokens": 64}
    config = make_config(
        make_models(tmp_path), Layout(1), rollout=rollout, training={"max_tokens_per_micro_batch": 260}
    )
    outline = outline_run(config, 1, Machine(is_elsewhere=True))
    rollouts = assumed_rollouts(config, longest=True)
    planned = []
    for batch, scale in (
        (step_batch(config, outline, rollouts), 1.0),
        shortened(config, outline, rollouts, longest=True),
    ):
        simulated = simulate_rank(config, outline, 0, batch, AssumedSelection.of(outline.selector, batch))
        seconds = seconds_of(simulated, outline, find_device("h800"), 8, scale)
        planned.append(PlannedRank(RankKind(0, "", 1, False), "longest", simulated, scale, 0.0, seconds, 8))
    whole, short = planned
    assert short.scale == 3.0, "2 of 6 micro-batches"
    assert short.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.05)
    for phase in PHASES:
        assert short.flops(phase) == pytest.approx(whole.flops(phase), rel=0.02), phase
        assert short.seconds[phase] == pytest.approx(whole.seconds[phase], rel=0.1), phase
