"""The content of a run's folder, read for the report. The run need not be finished."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tip.errors import InputError
from megatron_tip.files import finite_number, parse_json
from megatron_tip.observability.metrics_file import read_metrics
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_table import TokenTable, read_token_table
from megatron_tip.report.timeline import read_timeline

MAX_STEPS = 1000
"""Most points of a curve, more than a figure has pixels; for a longer run each is the mean of several steps."""

Config = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RunData:
    """One run. `metrics`: by name, one value a point, None where it was not recorded. `steps`: of the points, each the
    last of the `stride` steps that it averages. `config`: as written by the run; "" if the file is missing. `timeline`:
    from `timeline.read_timeline`. `notes`: what could not be read, to be shown.
    """

    name: str
    config: Config
    steps: list[int]
    stride: int
    metrics: dict[str, list[float | None]]
    summary: Mapping[str, Any] | None
    samples: list[dict[str, str]]
    evaluations: list[dict[str, Any]]
    tables: list[TokenTable]
    timeline: list[dict[str, Any]]
    notes: list[str]


def read_run(path: Path, name: str) -> RunData:
    """Returns the run in folder `path`.

    Raises:
        InputError: metrics.jsonl is missing, or broken before its last line.
    """
    folder = RunFolder(path)
    if not folder.metrics.exists():
        raise InputError(
            f"{path}: expected the folder of a run, with its metrics.jsonl, got {_what_is_there(path)}; give the "
            "run.folder of a run that has taken at least one step"
        )
    notes: list[str] = []
    steps, stride, metrics = thinned(read_metrics(folder.metrics))
    return RunData(
        name=name,
        config=_config(folder.config, notes),
        steps=steps,
        stride=stride,
        metrics=metrics,
        summary=_summary(folder.summary, notes),
        samples=list(_json_lines(folder.samples, notes)),
        evaluations=list(_json_lines(folder.evaluations, notes)),
        tables=list(_tables(folder.views, notes)),
        timeline=read_timeline(folder.trace),
        notes=notes,
    )


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Returns the runs in folders `paths`, each under its folder's name, numbered if two are the same.

    Raises:
        InputError: as for `read_run`.
    """
    names: list[str] = []
    for path in paths:
        own = path.resolve().name
        count = sum(name == own or name.startswith(f"{own} (") for name in names)
        names.append(f"{own} ({count + 1})" if count else own)
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def thinned(
    records: Sequence[Mapping[str, Any]], max_steps: int = MAX_STEPS
) -> tuple[list[int], int, dict[str, list[float | None]]]:
    """Returns the steps, stride and columns of the metrics' lines, as at most `max_steps` points.

    Each point is the mean of `stride` consecutive lines, over those that have the metric; None if none has.
    """
    stride = max(1, -(-len(records) // max_steps))
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    groups = [records[start : start + stride] for start in range(0, len(records), stride)]
    columns: dict[str, list[float | None]] = {name: [] for name in names}
    for group in groups:
        for name, column in columns.items():
            found = [value for record in group if (value := finite_number(record.get(name))) is not None]
            column.append(float(f"{sum(found) / len(found):.4g}") if found else None)
    return [group[-1]["step"] for group in groups], stride, columns


def differing_keys(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """Returns ("section.key", each run's value) where the configurations differ; None: the run lacks the key."""
    flat = [{f"{s}.{key}": v for s, keys in run.config.items() for key, v in keys.items()} for run in runs]
    names = dict.fromkeys(name for keys in flat for name in keys if name != "run.folder")
    rows = [(name, [keys.get(name) for keys in flat]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "no such folder"
    return f"a folder with {sorted(child.name for child in path.iterdir())[:8]}" if path.is_dir() else "a file"


def _config(path: Path, notes: list[str]) -> Config:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    return {section: keys for section, keys in content.items() if isinstance(keys, dict)}


def _summary(path: Path, notes: list[str]) -> Mapping[str, Any] | None:
    if not path.exists():
        notes.append("the run has no summary.json: it is not finished, or was ended")
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and all(isinstance(content.get(name, {}), dict) for name in _SECTIONS):
            return content
        reason: object = f"expected an object with objects for {', '.join(_SECTIONS)}"
    except (OSError, ValueError) as error:
        reason = error
    notes.append(f"{path.name} cannot be read: {reason}")
    return None


_SECTIONS = ("world", "tokens", "seconds", "heldout_reverse_kl")


def _json_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file, which may be missing; broken lines are noted and left out."""
    try:  # as bytes: a text's lines would also end at characters that JSON may hold, such as U+2028
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("protocol") or {}, dict):
            yield record
        else:
            notes.append(f"{path.name}, line {number} is broken and left out")


def _tables(folder: Path, notes: list[str]) -> Iterator[TokenTable]:
    for path in sorted(folder.glob("step_*.parquet")):
        try:
            yield read_token_table(path)
        except InputError as error:
            notes.append(str(error).replace(str(folder), folder.name))
