"""The formulas of `train --dry-run` and the simulated ranks agree on the memory of every recipe for GPUs."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.planning.memory_estimate import UNCOUNTED, estimate_memory
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.plan import make_plan, planned_hosts
from tools.plan_recipes import recipes_for_gpus

SHARE = 0.15
"""Of the simulated peak, without what both set aside."""


def test_every_recipe_of_the_papers_is_planned():
    assert len(recipes_for_gpus()) == 7


@pytest.mark.parametrize("path", recipes_for_gpus(), ids=lambda path: path.stem)
@pytest.mark.parametrize("offload", ["none", "all"])
@pytest.mark.timeout(900)
def test_formulas_and_simulation_agree(path: Path, offload: str):
    config, device = load_config(path, [f"training.offload={offload}"]), find_device("h800")
    plan = make_plan(config, planned_hosts(config, 8, 8, device), device, batches=("longest",))
    phases = estimate_memory(config, plan.outline, gpu_memory_gib=device.memory_gib).phases
    estimated = max(sum(parts.values()) - parts[UNCOUNTED] for parts in phases.values())
    assert estimated == pytest.approx(plan.fullest.peak_bytes, rel=SHARE)
