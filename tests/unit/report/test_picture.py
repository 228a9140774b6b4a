"""The report's data and picture, from whole, partial and broken metrics."""

import json

import pytest
from matplotlib.figure import Figure

from megatron_tip.errors import InputError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.report.picture import read_metrics, write_report

PNG = b"\x89PNG"


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look into."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))[1]
    )
    return figures


def write_steps(folder, steps):
    folder.metrics.write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_what_was_measured_is_what_is_drawn(folder, drawn):
    write_steps(
        folder,
        [
            {"step": 0, "heldout/reverse_kl": 5.0, "time/heldout_seconds": 9.0},
            {"step": 1, "train/reverse_kl": 4.0, "selection/retention_ratio": 0.1, "time/rollout_seconds": 2.0},
            {"step": 2, "train/reverse_kl": None, "time/rollout_seconds": 3.0, "time/train_seconds": 1.0},
            {"step": 3, "train/reverse_kl": 2.0, "heldout/reverse_kl": 1.0, "train/student_entropy": 0.5},
        ],
    )
    write_report(folder)
    assert folder.report.read_bytes().startswith(PNG)
    kl, entropy, share, seconds = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in kl.lines}
    assert lines == {
        "rollouts, before the step": [[1.0, 4.0], [3.0, 2.0]],
        "held-out prompts": [[0.0, 5.0], [3.0, 1.0]],
    }
    assert entropy.lines[0].get_xydata().tolist() == [[3.0, 0.5]]
    assert share.lines[0].get_xydata().tolist() == [[1.0, 0.1]]
    stacked = {patch.get_label(): patch.get_data() for patch in seconds.patches}
    assert stacked["rollout"].values.tolist() == [2.0, 3.0, 0.0]
    assert stacked["train"].values.tolist() == [2.0, 4.0, 0.0]
    assert stacked["train"].baseline.tolist() == [2.0, 3.0, 0.0]
    assert "heldout" not in stacked


@pytest.mark.parametrize("steps", [[], [{"step": 1}]], ids=["no step", "no metric"])
def test_panels_without_data_say_so(folder, drawn, steps):
    write_steps(folder, steps)
    write_report(folder)
    assert folder.report.read_bytes().startswith(PNG)
    assert [axes.texts[0].get_text() for axes in drawn[0].axes] == ["not measured"] * 4


def test_kl_that_reaches_zero_is_drawn_on_a_linear_scale(folder, drawn):
    write_steps(folder, [{"step": 1, "train/reverse_kl": 1.0}, {"step": 2, "train/reverse_kl": 0.0}])
    write_report(folder)
    assert drawn[0].axes[0].get_yscale() == "linear"


def test_last_line_cut_off_by_a_crash_is_left_out(folder):
    folder.metrics.write_text('{"step": 1}\n{"step": 2, "tra')
    assert read_metrics(folder.metrics) == [{"step": 1}]


def test_broken_line_is_named(folder):
    folder.metrics.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_metrics(folder.metrics)


def test_missing_metrics_are_named(folder):
    with pytest.raises(InputError, match=r"metrics\.jsonl: expected a run's metrics, got: No such file"):
        write_report(folder)
