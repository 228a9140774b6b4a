"""A search finds the fastest layouts that fit, says how to set them, and what is missing where it does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tip.config.io import dump_config, load_config
from megatron_tip.simulation import search
from megatron_tip.simulation.device import Device, find_device
from megatron_tip.simulation.plan import make_plan, planned_hosts
from megatron_tip.simulation.search import overrides_of, search_layouts, with_values
from tests.helpers.training import Layout, make_config, make_models

pytestmark = pytest.mark.timeout(900)


def device_of(memory_gib: float) -> Device:
    return replace(find_device("h800"), memory_gib=memory_gib)


def test_the_best_fit_and_are_sorted_and_their_overrides_give_the_same_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(search, "SIZES", (1, 2))
    config = make_config(make_models(tmp_path), Layout(4), rollout={"prompts_per_step": 16})
    hosts, said = planned_hosts(config, 1, 4, device_of(80)), []
    found = search_layouts(config, hosts, device_of(80), say=said.append)
    assert not found.near
    seconds = [plan.step_seconds("typical") for _, plan in found.best]
    assert len(seconds) == search.NUM_BEST
    assert seconds == sorted(seconds)
    assert all(plan.fits for _, plan in found.best)
    values, plan = found.best[0]
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config))
    again = make_plan(load_config(path, overrides_of(values).split()), hosts, device_of(80))
    assert again.step_seconds("typical") == plan.step_seconds("typical")
    assert any("teacher.tensor_parallel_size=2" in text for text in said)


def test_a_combination_is_estimated_as_it_is_planned_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "SIZES", (2,))
    config = make_config(make_models(tmp_path), Layout(4), rollout={"prompts_per_step": 16})
    hosts = planned_hosts(config, 1, 4, device_of(1e-3))
    found = search_layouts(config, hosts, device_of(1e-3), say=lambda text: None)
    assert not found.best
    assert len(found.near) == search.NUM_BEST
    for choice in found.near:
        plan = make_plan(with_values(config, choice.values), hosts, device_of(1e-3), batches=("longest",))
        assert choice.missing_bytes == pytest.approx(plan.missing_bytes, rel=0.1), choice.values
