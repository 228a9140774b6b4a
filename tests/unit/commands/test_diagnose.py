"""What `megatron-tip diagnose` refuses before any worker starts."""

from pathlib import Path

from typer.testing import CliRunner

from megatron_tip.cli import app
from megatron_tip.diagnostics.scores import write_scores
from tests.helpers.diagnostics import make_bank, make_scores

STUDY = Path(__file__).parents[3] / "examples/fixed_context_study/study.toml"


def test_scores_of_a_checkpoint_do_not_replace_those_of_the_start(tmp_path: Path):
    ended = CliRunner().invoke(app, ["diagnose", "score", str(STUDY), "--checkpoint", str(tmp_path)])
    assert ended.exit_code == 2
    assert 'a name other than "start"' in ended.output


def test_advice_is_for_the_scores_that_are_named(tmp_path: Path):
    bank = make_bank(tmp_path / "bank")
    write_scores(bank.scores_path("later"), make_scores(bank))
    command = ["diagnose", "advise", str(bank.folder), "--resamples", "20"]
    said = CliRunner().invoke(app, [*command, "--start", "later", "--ratio", "0.1", "--k", "8"])
    assert said.exit_code == 0, said.output
    assert "1200 tokens of 60 prompts, K = 8" in said.output
    assert "At 10 % (120 tokens)" in said.output
    assert "At 5 %" not in said.output
    missing = CliRunner().invoke(app, command)
    assert missing.exit_code == 2
    assert "existing: later" in missing.output
    refused = CliRunner().invoke(app, [*command, "--start", "later", "--ratio", "5"])
    assert refused.exit_code == 2
    assert "--ratio: expected numbers in (0, 1], got [5.0]" in refused.output
