"""metrics.jsonl: a whole line a step, whatever the values and the disk."""

import errno
import json
import math
import os

import pytest

from megatron_tip.errors import InputError, OutputError
from megatron_tip.observability.metrics_file import MetricsWriter, read_metrics, recorded_steps


def test_each_step_is_a_line_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"train/loss": 2.5})
        assert json.loads(path.read_text()) == {"step": 1, "train/loss": 2.5}
        writer.write(2, {"train/loss": 1.5})
    assert [json.loads(line)["train/loss"] for line in path.read_text().splitlines()] == [2.5, 1.5]


def test_values_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    assert path.read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": 0.0}\n'


def test_file_is_started_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("an unfinished run's\n")
    MetricsWriter(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("failure", ["nothing written", "half written", "not synced"])
def test_full_disk_leaves_whole_lines(tmp_path, monkeypatch, failure):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = os.write
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"train/loss": 1.0})
        before = path.read_text()
        if failure == "not synced":
            monkeypatch.setattr(os, "fsync", no_space)
        else:
            part = {"nothing written": no_space, "half written": lambda file, data: write(file, data[:5])}
            monkeypatch.setattr(os, "write", part[failure])
        with pytest.raises(OutputError, match=r"metrics\.jsonl: cannot write: No space left"):
            writer.write(2, {"train/loss": 1.0})
        monkeypatch.undo()
        assert path.read_text() == before


def test_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        MetricsWriter(tmp_path / "gone" / "metrics.jsonl")


def test_a_continued_run_cuts_what_lies_behind_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(4):
            writer.write(step, {"a": step / 3})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "a"')  # a line that a crash cut off
    with MetricsWriter(path, keep_until_step=2) as writer:
        writer.write(3, {"a": 3 / 3})
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    with MetricsWriter(path, keep_until_step=3):
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])


def test_steps_are_read_as_they_were_given(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(0, {"a": math.nan, "b": 0.1})
        writer.write(1, {"a": 2.0})
    (first, first_metrics), second = recorded_steps(tmp_path / "metrics.jsonl")
    assert (first, first_metrics["b"], math.isnan(first_metrics["a"])) == (0, 0.1, True)
    assert second == (1, {"a": 2.0})


def test_bytes_that_are_no_text_are_refused_by_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": 1, "\xff": 2}\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: expected a JSON object with a step"):
        read_metrics(tmp_path / "metrics.jsonl")
