"""The runs of a sweep, as its folder lists them, and their results over seeds."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tip.errors import InputError
from megatron_tip.files import atomic_write_text, finite_number, output_errors, parse_json
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.report.seeds import mean_and_half

FORMAT = "megatron_tip sweep 1"


@dataclass(frozen=True)
class SweepEntry:
    """One run of a sweep. `name`: of its folder within the sweep's."""

    name: str
    rule: str
    budget: float
    seed: int


@dataclass(frozen=True)
class Arm:
    """The runs of one rule and budget.

    `summaries`: those of the finished runs, by seed; `missing`: the other seeds. `folders`: of the runs, by seed.
    """

    rule: str
    budget: float
    summaries: dict[int, dict[str, Any]]
    missing: list[int]
    folders: dict[int, Path]

    def values(self, *path: str) -> list[float]:
        """Returns the finite numbers at `path` in the summaries, in the order of the seeds."""
        found = []
        for summary in self.summaries.values():
            value: Any = summary
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if (number := finite_number(value)) is not None:
                found.append(number)
        return found

    def interval(self, *path: str) -> tuple[float, float]:
        """Returns mean and half width of the interval over seeds of the numbers at `path`."""
        return mean_and_half(self.values(*path))


def sweep_file(folder: Path) -> Path:
    """Returns the file that makes a folder that of a sweep."""
    return folder / "sweep.json"


def write_sweep(folder: Path, entries: Sequence[SweepEntry]) -> None:
    """Writes the list of a sweep's runs atomically; creates the folder. Raises OutputError if it is not writable."""
    path = sweep_file(folder)
    with output_errors(path, setting="folder"):
        folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "runs": [asdict(entry) for entry in entries]}
    atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", setting="folder")


def read_sweep(folder: Path) -> list[Arm]:
    """Returns the arms of the sweep in `folder`, the lowest held-out divergence first.

    Raises:
        InputError: the list of runs, or a run's summary, cannot be read.
    """
    path = sweep_file(folder)
    try:
        content = parse_json(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"the format {content['format']!r}")
        entries = [SweepEntry(**entry) for entry in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: expected the runs of a sweep, cannot read them ({type(error).__name__}: {error}); start "
            "`megatron-tip sweep` again, which writes the file and skips finished runs"
        ) from error
    arms: dict[tuple[str, float], Arm] = {}
    for entry in entries:
        arm = arms.setdefault((entry.rule, entry.budget), Arm(entry.rule, entry.budget, {}, [], {}))
        arm.folders[entry.seed] = folder / entry.name
        summary = _summary(RunFolder(folder / entry.name).summary)
        if summary is None:
            arm.missing.append(entry.seed)
        else:
            arm.summaries[entry.seed] = summary

    def order(arm: Arm) -> tuple[bool, float]:
        mean = arm.interval("heldout_reverse_kl", "after")[0]
        return math.isnan(mean), mean

    return sorted(arms.values(), key=order)


def _summary(path: Path) -> dict[str, Any] | None:
    """Returns a finished run's summary; None without one."""
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a run's summary, cannot read it: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a run's summary, got {type(content).__name__}")
    return content
