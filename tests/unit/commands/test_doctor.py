"""What the doctor finds, and that only what a run needs counts as missing."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatron_tip import machine
from megatron_tip.cli import app
from megatron_tip.commands import doctor
from megatron_tip.commands.doctor import examine
from tests.helpers.training import Layout, make_config, make_models

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a SLURM's programs; a real one whose controller does not run takes 9 s to say so."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    write_program(folder / "sbatch", "exit 0")
    write_program(folder / "sinfo", "echo 'batch up 8 nodes idle'")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_slurm_is_told_with_its_partitions():
    assert "SLURM: batch up 8 nodes idle" in [finding.text for finding in examine(None)]


def test_a_slurm_that_does_not_answer_is_a_note(slurm: Path):
    for script, why in {
        "echo 'sinfo: error: no controller' >&2; exit 1": "sinfo: error: no controller",
        "exit 3": "sinfo exited with code 3",
    }.items():
        write_program(slurm / "sinfo", script)
        (finding,) = [finding for finding in doctor._slurm(None) if "does not answer" in finding.text]
        assert (finding.state, finding.text) == ("note", f"SLURM is installed but does not answer: {why}")


def missing(models: Path, **sections: Any) -> list[str]:
    findings = examine(make_config(models, Layout(1), **sections))
    return [finding.text for finding in findings if finding.state == "missing"]


def test_a_machine_without_a_gpu_lacks_nothing():
    ended = RUNNER.invoke(app, ["doctor"])
    assert ended.exit_code == 0
    assert "MISSING" not in ended.stdout
    for name in ("torch", "megatron-core", "transformer-engine", "apex", "sglang", "wandb", "SLURM", "disk", "ports"):
        assert name in ended.stdout
    assert 'fix: pip install --no-build-isolation "megatron_tip[transformer-engine]"' in ended.stdout
    assert ended.stdout.splitlines()[-1] == "ready: a run lacks nothing here"


def test_a_megatron_that_no_test_runs_with_is_a_note(monkeypatch: pytest.MonkeyPatch):
    def notes() -> list[str]:
        return [finding.text for finding in doctor._torch(None) if "not among the versions" in finding.text]

    assert notes() == []
    monkeypatch.setattr(machine, "version", lambda _: "0.18.0")
    assert notes() == ["megatron-core 0.18.0 is not among the versions that are tested, 0.16.1 and 0.19.2"]


def test_a_run_that_can_start_lacks_nothing(models: Path):
    assert missing(models) == []


def test_what_the_configuration_needs_is_missing(models: Path, monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    assert missing(models) == []  # W&B is not asked for
    found = missing(models, tracking={"wandb": "offline"}, model={"transformer_impl": "transformer_engine"})
    assert [text.split(" is not installed")[0] for text in found[:2]] == ["transformer-engine", "wandb"]


def test_online_tracking_needs_a_login(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert any("no login found here" in text for text in missing(models, tracking={"wandb": "online"}))
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    findings = examine(make_config(models, Layout(1), tracking={"wandb": "online"}))
    assert not any("no login found here" in finding.text for finding in findings)
    assert not any("secret-key" in finding.line() for finding in findings)


def test_a_configuration_that_cannot_run_is_told_with_its_reason(models: Path):
    (text,) = missing(models, teacher={"tensor_parallel_size": 5})
    assert "tensor_parallel_size: expected a divisor of its 12 attention heads" in text


def test_layouts_are_told_and_parts_of_sequences_want_transformer_engine(models: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_config(models, Layout(2, cp=(2, 1)), model={"dtype": "auto"})
    texts = [finding.text for finding in examine(config)]
    assert "layouts: student tp 1 x pp 1 x cp 2 x dp 1, teacher tp 1 x pp 1 x dp 2" in texts
    assert not any("context_parallel_size" in text for text in texts), "on a CPU there is no other way"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (note,) = doctor._context_parallelism(config)
    assert (note.state, note.text.partition(":")[0]) == ("note", "model.context_parallel_size")


def test_a_taken_port_is_told(models: Path, monkeypatch: pytest.MonkeyPatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        (text,) = missing(models)
    assert "cannot be bound" in text


def test_exit_code_is_one_where_something_is_missing(tmp_path: Path):
    config = tmp_path / "run.toml"
    config.write_text(
        'run.folder = "r"\nmodel.path = "a"\nteacher.path = "b"\nprompts.path = "p"\ntraining.steps = 1\n'
    )
    ended = RUNNER.invoke(app, ["doctor", str(config)])
    assert ended.exit_code == 1
    assert "MISSING  the configuration cannot run: model.path: a/config.json: no such file" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "not ready: 1 missing, marked above"


RECIPE = str(Path(__file__).parents[3] / "examples/qwen3_4b_to_1p7b/qwen3_4b_to_1p7b.toml")


def test_a_recipe_for_a_cluster_is_checked_for_the_cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)  # nothing is installed here
    ended = RUNNER.invoke(app, ["doctor", RECIPE, "--world-size", "64"])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.splitlines()[-1] == "ready: this run lacks nothing there"
    for text in ("Qwen3-4B", "bfloat16", "of 80 GiB", "trainer, ranks 0-63", "each node needs sglang"):
        assert text in ended.stdout
    for text in ("no GPU", "disk:", "ports:", "SLURM", "MISSING"):
        assert text not in ended.stdout


def test_a_recipe_that_does_not_fit_the_cluster_is_not_ready():
    ended = RUNNER.invoke(app, ["doctor", RECIPE, "--world-size", "64", "--gpu-memory", "4"])
    assert ended.exit_code == 1
    assert "MISSING  the configuration cannot run there: memory: expected at most 4 GiB per GPU" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "not ready: 1 missing, marked above"
    ended = RUNNER.invoke(app, ["doctor", "--world-size", "64"])
    assert (ended.exit_code, "expected a configuration to check" in ended.output) == (2, True)
