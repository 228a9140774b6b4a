"""The formulas of `train --dry-run` and the simulated ranks agree on the memory of a recipe, phase by phase."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.planning.memory_estimate import UNCOUNTED, estimate_memory
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.kinds import MEMORY_PHASES
from megatron_tip.simulation.plan import make_plan, planned_hosts
from tools.plan_recipes import recipes_for_gpus

RECIPE = Path(__file__).parents[3] / "examples" / "llama3_70b_to_8b" / "llama3_70b_to_8b.toml"
SHARE = 0.1
"""Of the simulated bytes of a phase, without what both set aside."""


def test_the_table_of_recipes_has_all_that_generate_on_servers():
    assert len(recipes_for_gpus()) == 8


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.timeout(300)
def test_formulas_and_simulation_agree_in_every_phase(passes: str):
    """One rollout per replica, so that it takes seconds; `python -m tools.plan_recipes` plans all recipes whole."""
    device = find_device("h800")
    overrides = ["rollout.prompts_per_step=1", "heldout.num_prompts=16", f"selection.passes={passes}"]
    config = load_config(RECIPE, overrides)
    plan = make_plan(config, planned_hosts(config, 8, 8), device, batches=("longest",))
    (rank,) = plan.ranks
    estimated = estimate_memory(config, plan.outline, gpu_memory_gib=device.memory_gib).phases
    for phase, parts in rank.live.items():
        if phase != "select":  # holds less than "score"
            expected = estimated[MEMORY_PHASES.get(phase, phase)]
            assert sum(parts.values()) == pytest.approx(sum(expected.values()) - expected[UNCOUNTED], rel=SHARE), phase
