"""A search simulates the fastest layouts of tiny models, and prints them as overrides that give these layouts."""

import json
import shlex
from pathlib import Path

import pytest

from megatron_tip.config.io import dump_config, load_config
from megatron_tip.simulation import search as search_module
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.narrowing import Site
from megatron_tip.simulation.plan import TYPICAL, Plan, make_plan, planned_hosts
from megatron_tip.simulation.search import Search, search_layouts
from megatron_tip.simulation.search_report import as_text, as_values
from tests.helpers.training import Layout, make_config, make_models

pytestmark = pytest.mark.timeout(900)
GIVEN = ["training.max_tokens_per_micro_batch=64"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    config = make_config(make_models(folder), Layout(2, (1, 2), (1, 1)), rollout={"prompts_per_step": 4})
    path = folder / "config.toml"
    path.write_text(dump_config(config))
    return path


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def search(path: Path, said: list[str]) -> Search:
    site = Site(lambda more: load_config(path, [*GIVEN, *more]), find_device("h800"), 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "_NUM_SIMULATED", 3)
        return search_layouts(site, said.append)


def test_the_best_are_ordered_by_the_simulated_time(search: Search):
    assert isinstance(search.configured, Plan)
    seconds = [one.plan.step_seconds(TYPICAL) for one in search.best]
    assert len(seconds) == 3
    assert seconds == sorted(seconds)
    assert seconds[0] < search.configured.step_seconds(TYPICAL), "two stages for tiny models are slow"


def test_the_printed_overrides_give_the_simulated_layout(search: Search, path: Path):
    text = as_text(search, GIVEN, "1 nodes of 2 h800")
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(shlex.split(text.partition("step, s")[2].replace(" \\\n", " ")))
    for one in search.best:
        assert " ".join([*GIVEN, *one.overrides]) in words
        config = load_config(path, [*GIVEN, *one.overrides])
        assert config.model.tensor_parallel_size == one.plan.outline.student_grid.tp_size
        assert config.teacher.pipeline_parallel_size == one.plan.outline.teacher_grid.pp_size
    again = load_config(path, [*GIVEN, *search.best[0].overrides])
    planned = make_plan(again, planned_hosts(again, 1, 2), find_device("h800"), batches=(TYPICAL,))
    assert planned.step_seconds(TYPICAL) == pytest.approx(search.best[0].plan.step_seconds(TYPICAL))


def test_json_has_the_same_rows_and_the_configured_layout(search: Search):
    values = json.loads(json.dumps(as_values(search, GIVEN)))
    assert [row["step_seconds"] for row in values["best"]] == [one.plan.step_seconds(TYPICAL) for one in search.best]
    assert all(row["overrides"][:1] == GIVEN for row in values["best"])
    assert values["as_configured"]["student"]["pp"] == 2
    assert values["as_configured"]["fits"]


def test_the_progress_says_how_many_were_looked_at(search: Search, said: list[str]):
    assert said[-1] == f"simulated {search.num_simulated} layouts beside the configured one"
    assert any(f"ranked {search.num_layouts:,} layouts" in line for line in said)
    assert search.num_simulated <= 3 < search.num_estimated < search.num_layouts
