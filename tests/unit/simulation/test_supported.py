"""What a plan does not simulate is refused by the name of its setting, after everything that `train` refuses."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.planning.plan import outline_run
from megatron_tip.simulation.assumptions import assumed_rollouts
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.kinds import rank_kinds
from megatron_tip.simulation.layers import with_layers
from megatron_tip.simulation.plan import make_plan, planned_hosts
from megatron_tip.simulation.rank import step_batch
from megatron_tip.simulation.supported import check_simulated

EXAMPLES = Path(__file__).parents[3] / "examples"
DENSE = EXAMPLES / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"

SELF = ["teacher.kind=self", "teacher.path=models/Qwen3-4B", "teacher.tensor_parallel_size=2"]


def outlined(path: Path, *overrides: str):
    config = load_config(path, list(overrides))
    hosts = planned_hosts(config, 8, 8)
    return config, outline_run(config, hosts.workers, Machine(is_elsewhere=True), hosts)


@pytest.mark.parametrize(
    "overrides,setting",
    [
        (
            ["optimizer.distributed=true", "optimizer.use_precision_aware_optimizer=true"],
            "optimizer.use_precision_aware_optimizer: expected false",
        ),
        (["teacher.fp8=hybrid"], "teacher.fp8"),
        (["teacher.kind=sglang", 'teacher.urls=["http://127.0.0.1:1"]'], "teacher.kind: expected"),
    ],
    ids=["optimizer", "fp8", "served"],
)
def test_a_run_with_what_is_not_simulated_is_refused(overrides: list[str], setting: str):
    config, _ = outlined(DENSE, *overrides)
    with pytest.raises(ConfigError, match=setting) as refusal:
        check_simulated(config)
    assert "--dry-run" in str(refusal.value)


@pytest.mark.parametrize(
    "overrides,note",
    [
        (["model.context_parallel_size=2", "teacher.context_parallel_size=2"], "keys and values are gathered"),
        (["teacher.path=models/Qwen3-30B-A3B", "teacher.tensor_parallel_size=2"], "equally many tokens"),
        (["rollout.environment=calculator"], "its own tokens count as generated ones"),
        (SELF, "torch's own"),
        ([*SELF, "teacher.update=live", "prompts.teacher_system_prompt=Think."], "torch's own"),
        ([*SELF, "teacher.update=average"], "torch's own"),
    ],
    ids=["parts", "experts", "environment", "self", "live", "average"],
)
@pytest.mark.timeout(300)
def test_a_small_step_of_what_is_simulated_has_a_plan(overrides: list[str], note: str):
    small = ["rollout.prompts_per_step=4", "rollout.max_response_tokens=512", "heldout.num_prompts=4"]
    config = load_config(DENSE, [*small, *overrides])
    plan = make_plan(config, planned_hosts(config, 1, 8), find_device("h800"), batches=("typical",))
    assert all(plan.phase_seconds("typical")[phase] > 0 for phase in ("teacher", "score", "train", "update"))
    assert any(note in one for one in plan.notes)


def test_stages_of_different_sizes_are_different_kinds_and_small_models_have_equal_ones():
    keys = ["model.pipeline_parallel_size=4", "model.pipeline_layers=[8,10,10,8]", "teacher.pipeline_parallel_size=4"]
    config, outline = outlined(DENSE, *keys)
    check_simulated(config)
    batch = step_batch(config, outline, assumed_rollouts(config, longest=True))
    assert {kind.stages: kind.count for kind in rank_kinds(config, outline, batch)} == {
        "student first of 8 layers, teacher first": 16,
        "student middle of 10 layers, teacher middle": 32,
        "student last of 8 layers, teacher last": 16,
    }
    small = with_layers(config, outline, 2, 3)
    assert small.student.architecture.num_layers == 8
    assert small.student_grid.layers_of_stages(8) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
