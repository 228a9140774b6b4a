"""What a check gets, and where it writes what it finds. Free of torch."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Found:
    """What a check has found so far. `is_whole`: it came to its end."""

    values: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    is_whole: bool = False


@dataclass(frozen=True)
class Task:
    """A check's task. `device`: "cuda" or "cpu". `folder`: for its files, removed afterwards.

    What it finds goes to a file line by line, so that a process that is ended has left what it had.
    """

    device: str
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def size(self, on_gpu: T, on_cpu: T) -> T:
        """Returns the first on a GPU, else the second, which is small enough for two cores."""
        return on_gpu if self.on_gpu else on_cpu

    def note(self, **values: Any) -> None:
        """Records values by name; a dict under a name that has one already is merged into it."""
        self._write("values", values)

    def require(self, condition: bool, message: str) -> None:
        """Records `message` as a failure unless `condition` holds."""
        if not condition:
            self._write("failure", message)

    def end(self) -> None:
        """Records that the check came to its end."""
        self._write("end", True)

    def found(self) -> Found:
        """Returns what has been recorded so far; a last line that was cut off does not count."""
        found, path = Found(), self._path
        for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
            if line.endswith("\n"):
                _add(found, *json.loads(line))
        return found

    @property
    def _path(self) -> Path:
        return self.folder / "found.jsonl"

    def _write(self, kind: str, content: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([kind, content]) + "\n")


def _add(found: Found, kind: str, content: Any) -> None:
    if kind == "values":
        for name, value in content.items():
            merges = isinstance(value, dict) and isinstance(found.values.get(name), dict)
            found.values[name] = {**found.values[name], **value} if merges else value
    elif kind == "failure":
        found.failures.append(content)
    else:
        found.is_whole = True
