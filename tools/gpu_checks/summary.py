"""The table at the end of tools/check_gpu.py."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from tools.gpu_checks.run import Outcome

_STYLES = {
    "passed": "green",
    "failed": "red",
    "error": "red",
    "timed out": "red",
    "skipped": "dim",
    "not run": "yellow",
}


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """Returns one row per check: how it ended, its seconds, and what it found."""
    table = Table(title="Checks of a GPU", show_lines=True)
    for heading in ("check", "status", "s", "found"):
        table.add_column(heading, overflow="fold")
    for one in outcomes:
        status = f"[{_STYLES[one.status]}]{one.status}[/]" + ("" if one.proves else "\n(measures)")
        reasons = [one.why] * bool(one.why) + one.failures
        if one.log:
            reasons.append(one.log.splitlines()[-1])
        text = "\n".join([*reasons, *(f"{name}: {value}" for name, value in _flat(one.values))])
        table.add_row(one.check, status, f"{one.seconds:.0f}", escape(text))
    return table


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields names with short texts; a dict of dicts takes a line for each."""
    for name, value in values.items():
        if isinstance(value, dict) and any(isinstance(one, dict) for one in value.values()):
            yield from ((f"{name}, {inner}", _short(one)) for inner, one in value.items())
        else:
            yield name, _short(value)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items())
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
