"""A timeline of a run's phases in its first and last steps, from what `monitoring.trace` recorded on rank 0."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_tip.files import finite_number, parse_json

STEPS_AT_EACH_END = 3
MOST_PHASES = 400
"""Most phases of one step: enough for bars of a pixel or two."""
_READ_BYTES = 1 << 20
"""Bytes read at each end of the file: a long run's is not read whole."""

Step = dict[str, Any]


def read_timeline(folder: Path) -> list[Step]:
    """Returns the first and last whole steps in `folder`/rank_00000.jsonl; empty without the file.

    Each is {"step", "phases": [[name, seconds from the step's first phase, seconds]], "left_out": phases over
    MOST_PHASES}.
    """
    path = folder / "rank_00000.jsonl"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(_READ_BYTES)
            file.seek(max(0, size - _READ_BYTES))
            last = file.read()
    except OSError:
        return []
    steps = list(_steps(_events(first.splitlines())))[:STEPS_AT_EACH_END]
    # A part that starts within the file starts within a step.
    later = list(_steps(_events(last.splitlines())))[int(size > _READ_BYTES) :][-STEPS_AT_EACH_END:]
    shown = {step["step"] for step in steps}
    return steps + [step for step in later if step["step"] not in shown]


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            event = parse_json(line)
        except ValueError:  # truncated, by the end of the run or of our reading
            continue
        if isinstance(event, dict) and {"name", "ph", "ts"} <= event.keys():
            start, duration = finite_number(event["ts"]), finite_number(event.get("dur", 0.0))
            if start is not None and duration is not None:
                yield {"name": str(event["name"]), "ph": event["ph"], "ts": start, "dur": duration}


def _steps(events: Iterable[dict[str, Any]]) -> Iterator[Step]:
    phases: list[dict[str, Any]] = []
    for event in events:
        if event["ph"] == "X":
            phases.append(event)
        elif event["ph"] == "i" and event["name"].startswith("step "):
            if phases:
                yield _step(event["name"], phases)
            phases = []


def _step(name: str, phases: list[dict[str, Any]]) -> Step:
    start = min(event["ts"] for event in phases)
    # If there are too many, keeps the longest: the others would be too short to see.
    longest = sorted(phases, key=lambda event: -event["dur"])[:MOST_PHASES]
    rows = [
        [event["name"], round((event["ts"] - start) / 1e6, 4), round(event["dur"] / 1e6, 4)]
        for event in sorted(longest, key=lambda event: event["ts"])
    ]
    return {"step": name.removeprefix("step "), "phases": rows, "left_out": len(phases) - len(rows)}
