"""`megatron-tip plan` plans a run of tiny models on many GPUs, and refuses what train refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_tip.cli import app
from megatron_tip.config.io import dump_config
from tests.helpers.training import Layout, make_config, make_models

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    config = make_config(make_models(folder), Layout(8, (2, 2), (1, 2)), rollout={"prompts_per_step": 64})
    path = folder / "config.toml"
    path.write_text(dump_config(config))
    return path


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)


def test_table_has_80_columns_and_json_the_same_values(config_path: Path):
    result = run(str(config_path), "--nodes", "2", "--gpus-per-node", "4")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "student tp 2 x pp 2 x dp 2, teacher tp 1 x pp 2 x dp 4" in result.stdout
    values = json.loads(run(str(config_path), "--nodes", "2", "--gpus-per-node", "4", "--json").stdout)
    assert {rank["stages"] for rank in values["ranks"]} == {
        "student first, teacher first",
        "student last, teacher last",
    }
    assert sum(rank["count"] for rank in values["ranks"] if rank["batch"] == "longest") == 8
    longest, typical = values["batches"]["longest"], values["batches"]["typical"]
    assert longest["response_tokens"] == 64 * 64 > typical["response_tokens"]
    assert longest["step_seconds"] == pytest.approx(sum(longest["phase_seconds"].values()))
    assert values["fits"]


def test_an_unknown_gpu_is_named(config_path: Path):
    result = run(str(config_path), "--gpu", "h900")
    assert result.exit_code == 2
    assert "expected one of h800, h100" in result.stderr


def test_a_page_that_cannot_be_written_is_refused_before_the_simulation(config_path: Path, tmp_path: Path):
    result = run(str(config_path), "--nodes", "2", "--gpus-per-node", "4", "--html", str(tmp_path))
    assert result.exit_code != 0
    assert "--html" in result.stderr
    assert "memory" not in result.stdout


def test_a_layout_that_does_not_fill_the_nodes_is_refused_as_by_train(config_path: Path):
    result = run(str(config_path), "--nodes", "1", "--gpus-per-node", "6")
    assert result.exit_code == 2
    assert "expected a world size that is a multiple of tp 2 x pp 2 = 4, got 6" in result.stderr


def test_what_does_not_fit_ends_with_the_missing_bytes(config_path: Path, tmp_path: Path):
    result = run(str(config_path), "--nodes", "2", "--gpus-per-node", "4", "--gpu", small_device(tmp_path))
    assert result.exit_code == 1
    assert "does NOT fit" in result.stdout


def small_device(folder: Path) -> str:
    path = folder / "small.toml"
    keys = ("tflops", "memory_gib", "memory_tb_per_s", "link_gb_per_s", "network_gb_per_s")
    path.write_text("\n".join(["[small]", *(f"{key} = 0.001" for key in keys), 'source = "a made-up device"']))
    return str(path)


def test_a_search_in_which_nothing_fits_ends_with_the_missing_bytes(config_path: Path, tmp_path: Path):
    result = run(str(config_path), "--nodes", "2", "--gpus-per-node", "4", "--gpu", small_device(tmp_path), "--search")
    assert result.exit_code == 1
    assert "no layout fits" in result.stdout
    assert "GiB are missing" in result.stdout
    assert "simulated 0 layouts beside the configured one" in result.stderr


def test_a_search_that_train_refuses_in_every_layout_ends_with_its_refusal(config_path: Path):
    result = run(str(config_path), "rollout.max_response_tokens=100000", "--nodes", "1", "--search")
    assert result.exit_code == 2
    assert "prompts.max_prompt_tokens + rollout.max_response_tokens: expected at most the student's" in result.stderr


@pytest.mark.parametrize("option", ["--html=plan.html", "--shares"])
def test_a_search_has_neither_a_page_nor_shares(config_path: Path, option: str):
    result = run(str(config_path), "--search", option)
    assert result.exit_code == 2
    assert "--search: expected neither --html nor --shares" in result.stderr
