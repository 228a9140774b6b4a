"""Overrides as the shell completes them, and as options that they are not."""

import sys

import pytest
from typer.testing import CliRunner

from megatron_tip.cli import app
from megatron_tip.commands.run_command import complete_override, configured_run
from tests.unit.config.test_io import MINIMAL


def test_keys_and_choices_are_completed():
    assert complete_override("optimizer.l") == ["optimizer.lr="]
    assert "selection.rule=" in complete_override("")
    assert complete_override("model.dtype=b") == ["model.dtype=bfloat16"]
    assert complete_override("prompts.shuffle=") == ["prompts.shuffle=true", "prompts.shuffle=false"]
    assert complete_override("nothing.of=") == complete_override("optimizer.lr=") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command_offers_completion(shell, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    ended = CliRunner().invoke(app, ["--show-completion", shell], prog_name="megatron-tip")
    assert ended.exit_code == 0, ended.output
    assert "_MEGATRON_TIP_COMPLETE" in ended.stdout


@pytest.mark.parametrize(
    "command", [["train"], ["submit"], ["doctor"], ["diagnose", "bank"], ["diagnose", "intervene"]]
)
def test_an_override_with_dashes_is_answered(command):
    ended = CliRunner().invoke(app, [*command, "run.toml", "--optimizer.lr=1e-4"])
    assert ended.exit_code == 2
    assert "did you mean optimizer.lr=1e-4?" in ended.output


@pytest.mark.parametrize(
    "words,expected_text",
    [
        (["submit", "run.toml", "--partition=gpu"], "--partition: no such option; use --sbatch=--partition=..."),
        (["submit", "run.toml", "-p", "gpu"], "-p: no such option; use --sbatch='-p ...'"),
        (["train", "run.toml", "--nodes", "8"], "--nodes: no such option; use --world-size, the number of GPUs of all"),
    ],
)
def test_an_option_of_another_command_is_answered(words, expected_text):
    ended = CliRunner().invoke(app, words)
    assert (ended.exit_code, expected_text in ended.output) == (2, True), ended.output


def test_an_option_of_sbatch_may_be_a_word_of_its_own(tmp_path):
    ended = CliRunner().invoke(app, ["submit", str(tmp_path / "no.toml"), "--sbatch", "--partition=gpu"])
    assert "no such option" not in ended.output
    assert "no.toml" in ended.output


def test_the_number_of_gpus_elsewhere_starts_nothing(tmp_path):
    (tmp_path / "run.toml").write_text(MINIMAL)
    ended = CliRunner().invoke(app, ["train", str(tmp_path / "run.toml"), "--world-size", "64"])
    assert (ended.exit_code, "--world-size: expected --dry-run beside it, got" in ended.output) == (2, True)


def test_modules_beside_the_file_are_looked_for_last(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "run.toml").write_text(MINIMAL)
    configured_run(tmp_path / "run.toml", None)
    configured_run(tmp_path / "run.toml", None)
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1
