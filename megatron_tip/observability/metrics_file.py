"""metrics.jsonl: one JSON object per step, on the disk before the next step begins."""

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from megatron_tip.errors import InputError
from megatron_tip.files import atomic_write_bytes, finite_json, output_errors, parse_json

logger = logging.getLogger(__name__)

MEASURED = ("time/", "memory/", "perf/", "gpu/", "host/")
"""Prefixes of metrics that measure the machine; they differ between runs that are otherwise identical."""

RecordedStep = tuple[int, Mapping[str, float]]
"""A step and its metrics."""


class MetricsWriter:
    """A writer that appends steps to a JSON-lines file. Only rank 0 creates one.

    Keys are `area/name_unit`. Values that are not finite are written as null.
    """

    def __init__(self, path: Path, *, keep_until_step: int | None = None) -> None:
        """Starts a new file, or removes what an interrupted run wrote after `keep_until_step`.

        Raises:
            OutputError: the file cannot be written.
        """
        self._path = path
        atomic_write_bytes(path, b"" if keep_until_step is None else b"".join(_lines_until(path, keep_until_step)))
        with output_errors(path):
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line and syncs it.

        Raises:
            OutputError: the disk is full; the file then ends with the previous line.
        """
        line = (json.dumps(finite_json({"step": step, **metrics}), allow_nan=False) + "\n").encode()
        with output_errors(self._path):
            end = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, end)
                raise

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lines_until(path: Path, step: int) -> Iterator[bytes]:
    """Yields the lines of steps up to `step`, and stops at a broken line."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if _step(parse_json(line))["step"] > step or not line.endswith(b"\n"):
                return
        except ValueError:
            return
        yield line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the steps of a metrics.jsonl in order, without a truncated last line.

    Raises:
        InputError: the file cannot be read, or a line before the last is broken.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: expected a run's metrics, got: {error.strerror}") from None
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            steps.append(_step(parse_json(line)))
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: expected a JSON object with a step, got {error}") from None
            logger.warning("%s: the last line is cut off and left out", path)
    return steps


def recorded_steps(path: Path) -> list[RecordedStep]:
    """Returns the steps of a metrics.jsonl in order as they were given to `MetricsWriter`: NaN for null.

    Raises:
        InputError: as for `read_metrics`.
    """

    def value_of(value: float | None) -> float:
        return float("nan") if value is None else value

    return [
        (record["step"], {name: value_of(value) for name, value in record.items() if name != "step"})
        for record in read_metrics(path)
    ]


def _step(record: Any) -> dict[str, Any]:
    """Returns `record` if it is the metrics of a step; raises ValueError otherwise."""
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{record!r:.80}")
    return record
