"""Benchmark questions from a folder, for machines without access to the hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_tip.errors import InputError
from megatron_tip.evaluation.presets import Preset

_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class OfflineData:
    """The questions of one benchmark: a file, and the `datasets` loader for it, "json" or "parquet"."""

    path: Path
    kind: str


def find_data(folder: Path, preset: Preset) -> OfflineData:
    """Returns `folder`/NAME.jsonl, .json or .parquet, or the only such file in the folder `folder`/NAME.

    Raises:
        InputError: no such file or several; it cannot be read; its first question lacks a field.
    """
    found = [path for ending in _KINDS if (path := folder / f"{preset.name}{ending}").is_file()]
    inner = folder / preset.name
    if not found and inner.is_dir():
        found = [path for path in sorted(inner.iterdir()) if path.suffix in _KINDS]
    if len(found) != 1:
        raise InputError(
            f"data: expected {folder / preset.name}.jsonl, .json or .parquet, or a folder {inner} with one such file, "
            f"got {[path.name for path in found] or 'none'}"
        )
    first = _first_record(found[0])
    if missing := [name for name in preset.fields if name not in first]:
        raise InputError(
            f"{found[0]}: expected questions with {', '.join(preset.fields)}, got one without {', '.join(missing)}; it "
            f"has {', '.join(sorted(first))}"
        )
    return OfflineData(found[0].resolve(), _KINDS[found[0].suffix])


def _first_record(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".parquet":
            return dict.fromkeys(pq.read_schema(path).names)
        text = path.read_text(encoding="utf-8")
        first = json.loads(text.splitlines()[0] if path.suffix == ".jsonl" else text)
        first = first[0] if isinstance(first, list) else first
        if not isinstance(first, dict):
            raise ValueError(f"{type(first).__name__} instead of an object")
        return first
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: expected a benchmark's questions, cannot read them: {error}") from error
