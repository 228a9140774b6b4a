"""The formulas of `train --dry-run` and the simulated ranks agree on the memory of a recipe, phase by phase."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.planning.memory_estimate import UNCOUNTED, estimate_memory
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.kinds import MEMORY_PHASES
from megatron_tip.simulation.plan import make_plan, planned_hosts
from tools.plan_recipes import recipes_for_gpus

EXAMPLES = Path(__file__).parents[3] / "examples"
PARTS = ["model.context_parallel_size=2", "teacher.context_parallel_size=2"]
AVERAGE = [
    *("teacher.kind=self", "teacher.update=average", "prompts.teacher_system_prompt=Think."),
    *("teacher.path=models/Qwen3-4B", "teacher.tensor_parallel_size=2"),
]
SHARE = 0.1
"""Of the simulated bytes of a phase, without what both set aside."""


def test_the_table_of_recipes_has_all_that_generate_on_servers():
    assert len(recipes_for_gpus()) == 8


@pytest.mark.parametrize(
    "recipe,overrides",
    [
        ("llama3_70b_to_8b", ["selection.passes=one"]),
        ("llama3_70b_to_8b", ["selection.passes=two"]),
        ("qwen3_14b_to_4b", [*PARTS, "selection.passes=two"]),
        ("qwen3_30b_a3b_to_4b", ["selection.passes=one"]),
        ("qwen3_14b_to_4b", [*AVERAGE, "selection.passes=two"]),
    ],
)
@pytest.mark.timeout(300)
def test_formulas_and_simulation_agree_in_every_phase(recipe: str, overrides: list[str]):
    """One rollout per replica, so that it takes seconds; `python -m tools.plan_recipes` plans all recipes whole."""
    device = find_device("h800")
    small = ["rollout.prompts_per_step=1", "heldout.num_prompts=16"]
    config = load_config(EXAMPLES / recipe / f"{recipe}.toml", [*small, *overrides])
    plan = make_plan(config, planned_hosts(config, 8, 8), device, batches=("longest",))
    estimated = estimate_memory(config, plan.outline, gpu_memory_gib=device.memory_gib).phases
    for phase in plan.ranks[0].live:
        if phase != "select":  # holds less than "score"
            fullest = max(sum(rank.live[phase].values()) for rank in plan.ranks)
            expected = estimated[MEMORY_PHASES.get(phase, phase)]
            assert fullest == pytest.approx(sum(expected.values()) - expected[UNCOUNTED], rel=SHARE), phase
