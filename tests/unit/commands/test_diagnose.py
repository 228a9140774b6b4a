"""What `megatron-tip diagnose` refuses before any worker starts."""

from pathlib import Path

from typer.testing import CliRunner

from megatron_tip.cli import app

STUDY = Path(__file__).parents[3] / "examples/fixed_context_study/study.toml"


def test_scores_of_a_checkpoint_do_not_replace_those_of_the_start(tmp_path: Path):
    ended = CliRunner().invoke(app, ["diagnose", "score", str(STUDY), "--checkpoint", str(tmp_path)])
    assert ended.exit_code == 2
    assert 'a name other than "start"' in ended.output
