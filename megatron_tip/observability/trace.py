"""trace.json: a time line of every worker's phases, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

import json
import time
from pathlib import Path
from typing import TextIO

from megatron_tip.observability.run_folder import atomic_write_text, output_errors


class TraceWriter:
    """Writes this worker's phases to trace/rank_<r>.jsonl as they end, so that a run that dies leaves them."""

    def __init__(self, folder: Path, rank: int) -> None:
        """`folder`: trace/ in the run's folder; created. A continued run appends."""
        self._rank = rank
        self._epoch = time.time() - time.perf_counter()
        path = folder / f"rank_{rank:05d}.jsonl"
        with output_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)

    def phase(self, name: str, start: float, seconds: float) -> None:
        """Takes a phase that began at `start` (time.perf_counter) and took `seconds`."""
        self._write({"name": name, "ph": "X", "ts": self._microseconds(start), "dur": seconds * 1e6})

    def step(self, step: int) -> None:
        """Marks the end of `step`."""
        now = self._microseconds(time.perf_counter())
        self._write({"name": f"step {step}", "ph": "i", "s": "p", "ts": now})

    def close(self) -> None:
        self._file.close()

    def _microseconds(self, counter: float) -> float:
        return (self._epoch + counter) * 1e6

    def _write(self, event: dict[str, object]) -> None:
        self._file.write(json.dumps({**event, "pid": self._rank, "tid": 0}) + "\n")


def join_traces(folder: Path, target: Path) -> None:
    """Joins the workers' files under `folder` into `target`, in the Trace Event Format. A line cut off is left out."""
    events = []
    for path in sorted(folder.glob("rank_*.jsonl")):
        rank = int(path.stem.removeprefix("rank_"))
        events.append({"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    atomic_write_text(target, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
