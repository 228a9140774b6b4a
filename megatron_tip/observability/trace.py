"""trace.json: a timeline of every worker's phases, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from megatron_tip.files import output_errors

logger = logging.getLogger(__name__)


class TraceWriter:
    """A writer of this worker's phases to trace/rank_<r>.jsonl as they end, so that a run that dies leaves them.

    Only opening the file may fail the run; a full disk later ends just the timeline.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        """Creates `folder`, trace/ in the run's folder, and opens the file; a continued run appends."""
        self._rank = rank
        self._epoch = time.time() - time.perf_counter()
        self._has_failed = False
        path = folder / f"rank_{rank:05d}.jsonl"
        with output_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)

    def phase(self, name: str, start: float, seconds: float) -> None:
        """Records a phase that began at `start` (time.perf_counter) and took `seconds`."""
        self._write({"name": name, "ph": "X", "ts": self._microseconds(start), "dur": seconds * 1e6})

    def step(self, step: int) -> None:
        """Marks the end of `step`."""
        now = self._microseconds(time.perf_counter())
        self._write({"name": f"step {step}", "ph": "i", "s": "p", "ts": now})

    def close(self) -> None:
        with suppress(OSError):  # the buffered rest may not fit on the disk
            self._file.close()

    def _microseconds(self, counter: float) -> float:
        return (self._epoch + counter) * 1e6

    def _write(self, event: dict[str, object]) -> None:
        if self._has_failed:
            return
        try:
            self._file.write(json.dumps({**event, "pid": self._rank, "tid": 0}) + "\n")
        except OSError as error:
            self._has_failed = True
            logger.warning("trace: the timeline ends here: %s", error)


def join_traces(folder: Path, target: Path) -> None:
    """Joins the workers' files under `folder` into `target`, in the Trace Event Format, without truncated lines.

    Works line by line: the files of a long run on many workers do not fit into memory.

    Raises:
        OutputError: `target` cannot be written; nothing of it remains.
    """
    beside = target.with_name(f".{target.name}.partial")
    with output_errors(target):
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write('{"displayTimeUnit": "ms", "traceEvents": [')
                for place, event in enumerate(_events(folder)):
                    file.write((",\n" if place else "\n") + json.dumps(event))
                file.write("\n]}\n")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def _events(folder: Path) -> Iterator[dict[str, object]]:
    for path in sorted(folder.glob("rank_*.jsonl")):
        rank = int(path.stem.removeprefix("rank_"))
        yield {"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue
