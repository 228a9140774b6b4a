"""The arms of an intervention: which there are, and what became of each, one JSON line an arm."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError, InputError
from megatron_tip.files import atomic_write_text, output_errors
from megatron_tip.selection import RULES
from megatron_tip.selection.rules import load_rule
from megatron_tip.statistics import STATISTICS


@dataclass(frozen=True)
class Arm:
    """One training from the start: a rule at an exact budget and a K, on the contexts of a seed."""

    rule: str
    retention_ratio: float
    support_size: int
    seed: int

    def __str__(self) -> str:
        return f"{self.rule} {100 * self.retention_ratio:g}% K={self.support_size} seed {self.seed}"


@dataclass(frozen=True)
class ArmResult:
    """What an arm did on contexts that it was not trained on.

    `contexts`: the held-out contexts. `num_tokens`, `before`, `after`: by held-out context, its tokens and the sums of
    KL(teacher || student) in nats over them. `num_valid`, `num_selected`: tokens over all steps. `metrics`: of the
    selection and the loss, means over the steps. `cpu_seconds`: of this process, its threads together.
    """

    arm: Arm
    trained_contexts: list[int]
    contexts: list[int]
    num_tokens: list[int]
    before: list[float]
    after: list[float]
    num_valid: int
    num_selected: int
    metrics: dict[str, float]
    cpu_seconds: float

    @property
    def gain(self) -> float:
        """G: mean over the held-out tokens of KL(teacher || start) - KL(teacher || trained), nats (TA-OPD Eq. 1)."""
        return (sum(self.before) - sum(self.after)) / sum(self.num_tokens)


def planned_arms(config: Config) -> list[Arm]:
    """All arms, so that an early end leaves the most: plain distillation, then the main budget, the others, other K.

    Raises:
        ConfigError: an unknown rule.
    """
    settings, selection = config.diagnostics, config.selection
    seeds, main = range(1, settings.seeds + 1), selection.retention_ratio
    rules = {name: load_rule(name) for name in settings.rules or RULES if name != "full"}
    depending = [
        name
        for name, rule in rules.items()
        if any(STATISTICS[one].over == "support" for one in rule.required_statistics)
    ]
    arms = [Arm("full", 1.0, selection.support_size, seed) for seed in seeds]
    for ratio in sorted({main, *settings.retention_ratios}, key=lambda ratio: abs(math.log(ratio / main))):
        arms += [Arm(name, ratio, selection.support_size, seed) for seed in seeds for name in rules]
    for size in settings.support_sizes:
        if size != selection.support_size:
            arms += [Arm(name, main, size, seed) for seed in seeds for name in depending]
    return arms


def settings_digest(settings: dict[str, Any]) -> str:
    """SHA-256 of the settings under which arms are comparable; what was trained beside them bears it."""
    return hashlib.sha256(json.dumps(_as_read(settings), sort_keys=True).encode()).hexdigest()


class ArmsFile:
    """`arms.jsonl` in a folder, and beside it the `settings.json` under which its arms are comparable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "arms.jsonl"
        self._settings = folder / "settings.json"

    def check(self, settings: dict[str, Any]) -> None:
        """Refuses a folder whose arms could not be compared with those of `settings`, or cannot be read. Only looks.

        Raises:
            ConfigError: arms of other settings, or of unknown ones, lie there. InputError: a file of it is broken.
        """
        has_arms = self._path.exists()  # looked at first: another rank, which may be writing, makes the settings first
        if self._settings.exists():
            before, settings = self.settings(), _as_read(settings)
            if changed := sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key)):
                raise ConfigError(
                    f"{self.folder}: holds arms of other settings, which would not be comparable; set them back, or "
                    "give another run.folder: "
                    + "; ".join(f"{key}: {before.get(key)!r}, now {settings.get(key)!r}" for key in changed)
                )
        elif has_arms:
            raise ConfigError(
                f"{self._settings}: expected the settings of the arms beside it, found none; bring it back, or give "
                "another run.folder"
            )
        if has_arms:
            self.read()

    def begin(self, settings: dict[str, Any]) -> None:
        """Makes the folder, or goes on in it: an unfinished last line is cut off. By one process; errors of `check`."""
        self.check(settings)
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not self._settings.exists():  # first, so that no arms are without
            atomic_write_text(self._settings, json.dumps(_as_read(settings), indent=1) + "\n")
        whole = "".join(self._whole_lines()) if self._path.exists() else None
        if whole is None or len(whole) < len(self._path.read_text(encoding="utf-8")):
            atomic_write_text(self._path, whole or "")

    def settings(self) -> dict[str, Any]:
        """Under which the arms are comparable.

        Raises:
            InputError: there is no such file, or it is broken.
        """
        try:
            return dict(json.loads(self._settings.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{self._settings}: expected the settings of an intervention's arms, cannot read them "
                f"({type(error).__name__}); bring the file back, or train the arms anew in another run.folder"
            ) from error

    def read(self) -> list[ArmResult]:
        """All arms that are done; an unfinished last line, which a crash leaves, is none.

        Raises:
            InputError: there is no such file, or a line of it is broken.
        """
        if not self._path.exists():
            raise InputError(
                f"{self._path}: expected the arms of an intervention, found none; run `megatron-tip diagnose intervene`"
            )
        return [self._result(number, line) for number, line in enumerate(self._whole_lines(), start=1)]

    def append(self, result: ArmResult) -> None:
        with output_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def _whole_lines(self) -> list[str]:
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [line + "\n" for line in lines[:-1]]  # what follows the last newline is unfinished, or empty

    def _result(self, number: int, line: str) -> ArmResult:
        try:
            record = json.loads(line)
            return ArmResult(**{**record, "arm": Arm(**record["arm"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self._path}, line {number}: expected an arm, got a broken line ({error}); mend it, or remove the "
                "line and `megatron-tip diagnose intervene` trains that arm again"
            ) from error


def _as_read(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: lists for tuples."""
    return json.loads(json.dumps(settings))
