"""The layouts that a search simulates fit, take as little offload as that needs, and are checked as a run is."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.planning.memory_estimate import estimate_memory
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.layouts import OFFLOADS
from megatron_tip.simulation.narrowing import Narrowing, Site, needed_bytes

pytestmark = pytest.mark.timeout(900)
RECIPE = Path(__file__).parents[3] / "examples" / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"


def site_of(*overrides: str, nodes: int, memory_gib: float = 80.0) -> Site:
    device = replace(find_device("h800"), memory_gib=memory_gib)
    return Site(lambda more: load_config(RECIPE, [*overrides, *more]), device, nodes, 8)


def missing_bytes(site: Site, *overrides: str) -> float:
    config = site.configure(overrides)
    memory = estimate_memory(config, site.outline(config), gpu_memory_gib=site.device.memory_gib)
    return needed_bytes(memory, config.model.recomputed) - site.device.memory_bytes


def test_candidates_fit_and_offload_no_more_than_that_needs():
    site = site_of(nodes=1, memory_gib=48.0)
    narrowing = Narrowing(site, site.outline(site.config))
    found = list(islice(narrowing.candidates(), 4))
    assert len({one.layout.pair for one in found}) == 4
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert any(one.layout.offload != "none" for one in found), "else the memory is too large for this test"
    for one in found:
        assert missing_bytes(site, *one.layout.overrides(site.config)) <= 0
        for less in OFFLOADS[: OFFLOADS.index(one.layout.offload)]:
            assert missing_bytes(site, *replace(one.layout, offload=less).overrides(site.config)) > 0
    assert narrowing.num_estimated < narrowing.num_layouts / 5, "most are left out by the bound of their time"


def test_layouts_that_train_refuses_are_no_candidates():
    """The 36 layers of the student have no equal parts in 8 stages."""
    site = site_of("model.pipeline_parallel_size=8", nodes=8)
    other = site_of(nodes=8)
    narrowing = Narrowing(site, other.outline(other.config))
    found = list(islice(narrowing.candidates(), 8))
    assert all(one.layout.student.pp in (1, 2, 4) for one in found)


def test_a_teacher_that_changes_stays_on_the_device():
    student = ["teacher.kind=self", "teacher.path=models/Qwen3-4B", "teacher.tensor_parallel_size=2"]
    site = site_of(*student, "teacher.update=average", nodes=1)
    found = list(islice(Narrowing(site, site.outline(site.config)).candidates(), 3))
    assert len(found) == 3
    assert all(one.layout.offload in ("none", "optimizer") for one in found)


def test_what_cannot_fit_is_told_with_the_bytes_that_it_lacks():
    site = site_of("rollout.engine=embedded", "rollout.prompts_per_step=16", nodes=1, memory_gib=6.0)
    narrowing = Narrowing(site, site.outline(site.config))
    assert list(narrowing.candidates()) == []
    assert narrowing.misfits
    for misfit in list(narrowing.misfits.values())[::8]:
        overrides = misfit.layout.overrides(site.config)
        assert misfit.missing_bytes == pytest.approx(missing_bytes(site, *overrides))
        assert misfit.missing_bytes > 0
