"""The formulas by which a search ranks layouts, against simulated steps."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.conversion.known_models import known_model
from megatron_tip.simulation.assumptions import assumed_rollouts
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.layouts import Layout
from megatron_tip.simulation.rough_time import RoughTime

EXAMPLES = Path(__file__).parents[3] / "examples"
RECIPE = EXAMPLES / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"
EXPERTS = EXAMPLES / "qwen3_30b_a3b_to_4b" / "qwen3_30b_a3b_to_4b.toml"
PARTS = "model.context_parallel_size", "teacher.context_parallel_size"


def rough_seconds(overrides: list[str], *, takes_one_pass: bool, path: Path = RECIPE) -> float:
    config = load_config(path, overrides)
    models = [known_model(path, owner="").architecture for path in (config.model.path, config.teacher.path)]
    rollouts = assumed_rollouts(config, longest=False)
    rough = RoughTime(config, models[0], models[1], find_device("h800"), 64, 8, rollouts)
    return rough.step_seconds(Layout.of(config), takes_one_pass=takes_one_pass)


def sizes(student: tuple[int, int], teacher: tuple[int, int], *more: str) -> list[str]:
    names = ("tensor_parallel_size", "pipeline_parallel_size")
    values = [f"model.{name}={value}" for name, value in zip(names, student, strict=True)]
    values += [f"teacher.{name}={value}" for name, value in zip(names, teacher, strict=True)]
    return [*values, f"model.sequence_parallel={str(student[0] > 1).lower()}", *more]


@pytest.mark.parametrize(
    "overrides,takes_one_pass,simulated",
    [
        (sizes((2, 1), (4, 1)), True, 3.93),
        (sizes((2, 1), (4, 1), "model.recompute_activations=false"), False, 3.97),
        (sizes((1, 1), (1, 1)), True, 3.18),
        (sizes((4, 2), (2, 2)), False, 5.35),
        (sizes((8, 1), (8, 1)), True, 6.48),
        (sizes((2, 1), (4, 1), *(f"{name}=2" for name in PARTS)), True, 4.11),
    ],
    ids=["recipe", "kept", "data", "pipeline", "tensor", "parts"],
)
def test_rough_times_are_near_simulated_ones(overrides: list[str], takes_one_pass: bool, simulated: float):
    """The seconds of a typical step without generation by `plan` with these overrides, --gpu h800 --nodes 8."""
    assert rough_seconds(overrides, takes_one_pass=takes_one_pass) == pytest.approx(simulated, rel=0.08)


@pytest.mark.parametrize(
    "overrides,simulated",
    [([], 2.97), (["teacher.tensor_parallel_size=1", "teacher.expert_model_parallel_size=4"], 2.80)],
)
def test_rough_times_with_experts_are_near_simulated_ones(overrides: list[str], simulated: float):
    assert rough_seconds(overrides, takes_one_pass=True, path=EXPERTS) == pytest.approx(simulated, rel=0.08)


def test_small_micro_batches_wait_more_in_a_pipeline():
    small, large = (
        rough_seconds(sizes((1, 4), (1, 4), f"training.max_tokens_per_micro_batch={tokens}"), takes_one_pass=False)
        for tokens in (8192, 65536)
    )
    assert large > 1.2 * small
