"""A simulated rank costs what a real one does: live bytes by phase, and the bytes of every message."""

from pathlib import Path

import pytest

from megatron_tip.simulation.parts import ACTIVATIONS
from tests.helpers.distributed import run_workers
from tests.helpers.simulation import CASES, configured, measured, same_traffic, simulated, simulated_cost


# `python -m tools.check_plan` compares the other layouts too, which takes longer.
@pytest.mark.parametrize(
    "name", ["1x1x1", "1x1x1 offload", "2x1x2 distributed", "1x1x2 cp 2", "2x1x1 experts", "1x1x2 experts"]
)
@pytest.mark.timeout(900)
def test_a_simulated_rank_costs_what_a_real_one_does(name: str, tmp_path: Path):
    world_size, config = CASES[name].world_size, configured(name, tmp_path)
    real = run_workers(measured, world_size, tmp_path, config, timeout_seconds=600)
    for rank, cost in zip(simulated(config, world_size), real, strict=True):
        found = simulated_cost(config, rank)
        assert same_traffic(found, cost, CASES[name].tolerance)
        assert found.flops == pytest.approx(cost.flops, rel=CASES[name].tolerance)
        assert found.moved == pytest.approx(cost.moved, rel=0.001)  # AdamW's step counts stay where they are
        assert bool(found.moved) == (config.training.offload != "none")
        assert cost.peaks.keys() >= {"build", "teacher", "score", "select", "train", "sync"}
        for phase, num_bytes in cost.peaks.items():
            assert found.peaks[phase] == pytest.approx(num_bytes, rel=0.1), phase


def test_recomputed_layers_with_experts_keep_little_during_the_pass_and_nothing_after_it(tmp_path: Path):
    """Megatron's dispatchers would keep the routers' graphs, and those all that was recomputed."""
    recomputed = configured("1x1x1 experts", tmp_path)
    kept = recomputed.model_copy(update={"model": recomputed.model.model_copy(update={"recompute_activations": False})})
    (less,), (more,) = (simulated(config, 1) for config in (recomputed, kept))
    during, without = (one.ledger.peaks["train"].parts[ACTIVATIONS] for one in (less, more))
    assert during < 0.5 * without
    assert less.ledger.peaks["update"].parts[ACTIVATIONS] < 0.02 * during
