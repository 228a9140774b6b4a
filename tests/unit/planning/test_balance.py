"""Stages of a pipeline, balanced by the work of layers and output heads."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.conversion.known_models import KNOWN_MODELS
from megatron_tip.planning.balance import balanced_layers, head_in_layers, pipeline_layers

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize(
    "num_layers,num_stages,extra,expected",
    [
        (36, 1, 3.0, ()),
        (36, 4, 0.0, (9, 9, 9, 9)),
        (30, 4, 0.0, (7, 7, 8, 8)),
        (36, 4, 4.0, (10, 10, 10, 6)),
        (36, 4, 2.5, (9, 10, 10, 7)),
        (8, 4, 20.0, (2, 2, 3, 1)),
        (3, 4, 0.0, ()),
    ],
)
def test_the_fullest_stage_has_the_least_work(num_layers: int, num_stages: int, extra: float, expected):
    found = balanced_layers(num_layers, num_stages, extra)
    assert found == expected
    if found:
        assert sum(found) == num_layers
        most = max(*found[:-1], found[-1] + extra)
        for last in range(1, num_layers - num_stages + 2):
            assert most <= max(-(-(num_layers - last) // (num_stages - 1)), last + extra)


def test_both_heads_count_in_layers_of_the_student():
    """Qwen3-4B and 14B, a tenth of the tokens selected, recomputation: by hand."""
    config = load_config(EXAMPLES / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml")
    student, teacher = (KNOWN_MODELS[name].architecture for name in ("Qwen3-4B", "Qwen3-14B"))
    layer = 2560 * (4096 + 2 * 1024) + 4096 * 2560 + 3 * 2560 * 9728 + 2 * 128
    expected = (1.3 * 2560 + 1.1 * 5120) * 151_936 / (5 * layer)
    assert head_in_layers(config, student, teacher) == pytest.approx(expected)
    assert head_in_layers(config, student, None) == pytest.approx(1.3 * 2560 * 151_936 / (5 * layer))


def test_auto_is_resolved_and_numbers_are_taken_as_they_are():
    path = EXAMPLES / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"
    student, teacher = (KNOWN_MODELS[name].architecture for name in ("Qwen3-4B", "Qwen3-14B"))
    sections = ("model.pipeline_layers=auto", "model.pipeline_parallel_size=4", "teacher.pipeline_layers=[30, 10]")
    config = load_config(path, sections)
    assert pipeline_layers(config, student, teacher, "model") == (9, 10, 10, 7)
    assert pipeline_layers(config, teacher, teacher, "teacher") == (30, 10)
