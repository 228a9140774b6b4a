"""The picture of a plan shows what the plan says, and loads nothing."""

import re

import pytest

from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.page import page_of
from megatron_tip.simulation.plan import Plan, make_plan, planned_hosts
from tests.helpers.training import Layout, make_config, make_models


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    models = make_models(tmp_path_factory.mktemp("models"))
    config = make_config(
        models, Layout(4, (1, 2), (2, 1)), rollout={"prompts_per_step": 16}, run={"folder": models / "a<b>"}
    )
    device = find_device("a100")
    return make_plan(config, planned_hosts(config, 1, 4), device)


@pytest.mark.timeout(900)
def test_bars_have_the_widths_of_their_seconds_and_the_heights_of_their_bytes(plan: Plan):
    page = page_of(plan)
    for rank in plan.ranks:
        for phase, seconds in rank.seconds.items():
            assert f"<title>{phase}: {seconds:.2f} s</title>" in page
    widths = [float(width) for width in re.findall(r'y="2" width="([\d.]+)" height="24"', page)]
    per_line = len(plan.phase_seconds("longest")) + 1
    slowest = [max(widths[place : per_line * 2 : per_line]) for place in range(per_line)]
    assert sum(slowest) == pytest.approx(1000, abs=1), "the slowest ranks of the first batch fill its line"
    assert f"{plan.fullest.peak_bytes / 2**30:.1f} GiB in {plan.fullest.peak_phase}" in page


@pytest.mark.timeout(900)
def test_the_page_loads_nothing_and_escapes_names(plan: Plan):
    page = page_of(plan)
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!#)|url\(|@import|<script", page)
    assert "a&lt;b&gt;" in page
    assert "a<b>" not in page
