"""The timeline that Perfetto reads."""

import json
from pathlib import Path

import pytest
import torch

from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.observability.trace import TraceWriter, join_traces


def test_phases_of_all_ranks_stand_in_one_time_line(tmp_path: Path):
    for rank in range(2):
        trace = TraceWriter(tmp_path / "trace", rank)
        timer = PhaseTimer(torch.device("cpu"), on_exit=trace.phase)
        with timer.phase("rollout"), timer.phase("generate"):
            pass
        trace.step(1)
        trace.close()
    with (tmp_path / "trace" / "rank_00001.jsonl").open("a") as file:
        file.write('{"name": "cut o')
    join_traces(tmp_path / "trace", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(event["pid"], event["name"], event["ph"]) for event in events] == [
        (rank, name, kind)
        for rank in range(2)
        for name, kind in (("process_name", "M"), ("generate", "X"), ("rollout", "X"), ("step 1", "i"))
    ]
    inner, outer = (next(e for e in events if e["name"] == name and e["pid"] == 1) for name in ("generate", "rollout"))
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3  # microseconds


def test_a_continued_run_goes_on_in_its_file(tmp_path: Path):
    for _ in range(2):
        trace = TraceWriter(tmp_path, 0)
        trace.phase("train", 0.0, 1.0)
        trace.close()
    assert len((tmp_path / "rank_00000.jsonl").read_text().splitlines()) == 2


def test_a_phase_is_in_microseconds(tmp_path: Path):
    trace = TraceWriter(tmp_path, 0)
    trace.phase("train", 1.0, 0.25)
    trace.phase("train", 2.0, 0.25)
    trace.close()
    first, second = (json.loads(line) for line in (tmp_path / "rank_00000.jsonl").read_text().splitlines())
    assert first["dur"] == 250_000
    assert second["ts"] - first["ts"] == pytest.approx(1e6)


def test_a_full_disk_ends_the_time_line_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "rank_00000.jsonl").symlink_to("/dev/full")
    trace = TraceWriter(tmp_path, 0)
    trace.phase("train", 1.0, 0.25)
    trace.step(1)
    trace.close()
    assert caplog.text.count("trace: the timeline ends here") == 1
