"""The shares of the phases in changed configurations are those of their own plans."""

import pytest

from megatron_tip.config.io import dump_config, load_config
from megatron_tip.simulation import shares as shares_module
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.narrowing import Site
from megatron_tip.simulation.page import page_of
from megatron_tip.simulation.plan import TYPICAL, Plan, make_plan, planned_hosts
from megatron_tip.simulation.report import as_text, as_values
from megatron_tip.simulation.shares import Variation, phase_shares
from tests.helpers.training import Layout, make_config, make_models

pytestmark = pytest.mark.timeout(900)


def planned(site: Site, *overrides: str) -> Plan:
    config = site.configure(overrides)
    return make_plan(config, planned_hosts(config, 1, 2), site.device, batches=(TYPICAL,))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("shares")
    rollout = {"prompts_per_step": 4, "engine": "sglang", "max_response_tokens": 150}
    config = make_config(make_models(folder), Layout(2), rollout=rollout, sglang={"share_gpus": True})
    path = folder / "config.toml"
    path.write_text(dump_config(config))
    return Site(lambda more: load_config(path, more), find_device("h800"), 1, 2)


@pytest.fixture(scope="module")
def configured(site: Site) -> Plan:
    return planned(site)


@pytest.fixture(scope="module")
def found(site: Site, configured: Plan) -> dict[str, Variation]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares_module, "_RATIOS", (1.0,))
        patch.setattr(shares_module, "_LENGTHS", (0.1, 30.0))
        return {one.name: one for one in phase_shares(site, configured, lambda line: None)}


def test_each_variation_is_the_plan_of_its_configuration(site: Site, configured: Plan, found: dict[str, Variation]):
    names = ["as configured", "100% selected", "responses up to 15", "responses up to 4,500", "servers: 1"]
    assert list(found) == names
    assert found["as configured"].step_seconds == configured.step_seconds(TYPICAL)
    short = planned(site, "rollout.max_response_tokens=15")
    assert found["responses up to 15"].step_seconds == pytest.approx(short.step_seconds(TYPICAL))
    assert found["responses up to 15"].shares["rollout"] < found["as configured"].shares["rollout"]


def test_other_servers_on_the_same_gpus_cost_what_a_plan_of_them_says(site: Site, found: dict[str, Variation]):
    one = planned(site, "sglang.tensor_parallel_size=2")
    expected = {"rollout": one.generation[TYPICAL].seconds, **one.phase_seconds(TYPICAL)}
    assert found["servers: 1"].seconds == pytest.approx(expected)


def test_a_variation_that_cannot_run_says_why(found: dict[str, Variation]):
    assert found["responses up to 4,500"].seconds is None
    assert "max_position_embeddings" in found["responses up to 4,500"].refusal


def test_text_json_and_page_have_the_table(configured: Plan, found: dict[str, Variation]):
    rows = list(found.values())
    text = as_text(configured, rows)
    assert max(map(len, text.splitlines())) <= 80
    values = as_values(configured, rows)["shares"]
    assert [row["name"] for row in values] == list(found)
    page = page_of(configured, rows)
    for one in rows:
        assert one.name in text
        assert one.name in page
        if one.seconds is not None:
            assert sum(one.shares.values()) == pytest.approx(1)
            assert f"{100 * one.shares['rollout']:.1f}" in page
