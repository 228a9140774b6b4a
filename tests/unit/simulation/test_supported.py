"""What a plan does not simulate is refused by the name of its setting, after everything that `train` refuses."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.planning.plan import outline_run
from megatron_tip.simulation.kinds import rank_kinds
from megatron_tip.simulation.layers import with_layers
from megatron_tip.simulation.plan import planned_hosts
from megatron_tip.simulation.supported import check_simulated

EXAMPLES = Path(__file__).parents[3] / "examples"
DENSE = EXAMPLES / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"
EXPERTS = EXAMPLES / "qwen3_30b_a3b_to_4b" / "qwen3_30b_a3b_to_4b.toml"

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
    "path,overrides",
    [
        (DENSE, ["model.context_parallel_size=2", "teacher.context_parallel_size=2"]),
        (EXPERTS, []),
        (DENSE, ["prompts.teacher_prompt_field=hint", "prompts.max_teacher_prompt_tokens=2048"]),
        (DENSE, ["rollout.environment=calculator"]),
        (DENSE, SELF),
        (DENSE, [*SELF, "teacher.update=live", "prompts.teacher_system_prompt=Think."]),
        (DENSE, [*SELF, "teacher.update=average"]),
    ],
    ids=["parts", "experts", "prompt", "environment", "self", "live", "average"],
)
def test_a_run_with_what_is_simulated_is_not_refused(path: Path, overrides: list[str]):
    check_simulated(outlined(path, *overrides)[0])


def test_stages_of_different_sizes_are_different_kinds_and_small_models_have_equal_ones():
    keys = ["model.pipeline_parallel_size=4", "model.pipeline_layers=[8,10,10,8]", "teacher.pipeline_parallel_size=4"]
    config, outline = outlined(DENSE, *keys)
    check_simulated(config)
    assert {kind.stages: kind.count for kind in rank_kinds(config, outline)} == {
        "student first of 8 layers, teacher first": 16,
        "student middle of 10 layers, teacher middle": 32,
        "student last of 8 layers, teacher last": 16,
    }
    small = with_layers(config, outline, 2, 3)
    assert small.student.architecture.num_layers == 8
    assert small.student_grid.layers_of_stages(8) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
