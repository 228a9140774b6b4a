"""What the tool reads of a run that is still writing."""

from pathlib import Path

from megatron_tip.observability.run_folder import RunFolder
from tools.try_faults import Trial


def test_a_step_counts_once_its_line_is_whole(tmp_path: Path):
    trial = Trial(tmp_path / "run.toml", [], RunFolder(tmp_path), 8, RunFolder(tmp_path / "undisturbed"))
    assert trial.recorded() == -1
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 1.2')
    assert trial.recorded() == 0
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 1.25}\n')
    assert trial.recorded() == 1
