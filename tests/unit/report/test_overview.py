"""The overview says what was trained on what, and warns where measurements do not compare."""

import pytest

from megatron_tip.report.overview import heldout_warning, overview_rows
from megatron_tip.report.run_data import RunData


def run_of(**sections):
    config = {"model": {"path": "models/Qwen3-1.7B"}, "teacher": {"path": "models/Qwen3-4B"}}
    config |= {"prompts": {"source": "file", "path": "data/dapo.parquet"}, "heldout": {"num_prompts": 8}}
    config |= {"selection": {"rule": "random", "retention_ratio": 0.1}, "run": {"seed": 1}}
    for name, keys in sections.items():
        config[name] = config[name] | keys
    summary = {"steps": 4, "seconds": {"total": 80.0}, "tokens": {"valid": 1600}}
    return RunData("a", config, [0, 4], 1, {}, summary, [], [], [], [], [])


def test_models_prompts_and_rate_are_in_the_overview():
    rows = dict(overview_rows([run_of(), run_of(model={"drop_layers": [1, 2]}, selection={"rule": "full"})]))
    assert rows["Student"] == ["Qwen3-1.7B", "Qwen3-1.7B without 2 layers"]
    assert rows["Teacher"] == ["Qwen3-4B"] * 2
    assert rows["Prompts"] == ["dapo.parquet"] * 2
    assert rows["Rule, budget"] == ["random, 10.0%", "full"]
    assert rows["Rate"] == ["20.0 s per step, 20.0 response tokens per second, with start, measurements and saves"] * 2


@pytest.mark.parametrize(
    "sections,expected",
    [
        ({}, ""),
        ({"selection": {"rule": "full"}}, ""),
        ({"run": {"seed": 2}}, ""),
        ({"heldout": {"num_prompts": 9}}, "heldout.num_prompts"),
        ({"prompts": {"path": "other.jsonl"}}, "prompts.path"),
        ({"prompts": {"source": "reasoning_gym"}, "run": {"seed": 2}}, "run.seed"),
    ],
)
def test_a_warning_where_held_out_sets_differ(sections, expected: str):
    warning = heldout_warning([run_of(), run_of(**sections)])
    assert (expected in warning) if expected else warning == ""
