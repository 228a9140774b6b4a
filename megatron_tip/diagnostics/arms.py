"""The arms of an intervention and their results, one JSON line per arm."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError, InputError
from megatron_tip.files import atomic_write_text, output_errors, parse_json
from megatron_tip.selection import PAPERS_RULES
from megatron_tip.selection.rules import load_rule
from megatron_tip.statistics import STATISTICS


@dataclass(frozen=True)
class Arm:
    """One training from the start: a rule with an exact budget and a K, on the contexts of a seed."""

    rule: str
    retention_ratio: float
    support_size: int
    seed: int

    def __str__(self) -> str:
        return f"{self.rule} {100 * self.retention_ratio:g}% K={self.support_size} seed {self.seed}"


@dataclass(frozen=True)
class ArmResult:
    """The result of an arm on held-out contexts.

    `contexts`: the held-out contexts. `num_tokens`, `before`, `after`: per held-out context, its tokens and the sums of
    KL(teacher || student) over them in nats. `num_valid`, `num_selected`: tokens over all steps. `metrics`: of the
    selection and the loss, means over the steps. `cpu_seconds`: of all threads of this process.
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
    """Returns all arms, the most useful first: plain distillation, the main budget, other budgets, other K.

    Raises:
        ConfigError: a rule is unknown.
    """
    settings, selection = config.diagnostics, config.selection
    seeds, main = range(1, settings.seeds + 1), selection.retention_ratio
    rules = {name: load_rule(name) for name in settings.rules or PAPERS_RULES if name != "full"}
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
    """Returns the SHA-256 of the settings that arms must share to be comparable; scores trained with them record it."""
    return hashlib.sha256(json.dumps(_as_read(settings), sort_keys=True).encode()).hexdigest()


class ArmsFile:
    """`arms.jsonl` in a folder, with `settings.json`, the settings that make its arms comparable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "arms.jsonl"
        self._settings = folder / "settings.json"

    def check(self, settings: dict[str, Any]) -> None:
        """Checks, without writing, that the folder's arms are readable and comparable with those of `settings`.

        Raises:
            ConfigError: the folder has arms of other or unknown settings. InputError: one of its files is broken.
        """
        has_arms = self._path.exists()  # checked first: another rank may be writing, and it writes the settings first
        if self._settings.exists():
            before, settings = self.settings(), _as_read(settings)
            if changed := sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key)):
                raise ConfigError(
                    f"{self.folder}: holds arms of other settings, which are not comparable; restore the settings, or "
                    "choose another run.folder: "
                    + "; ".join(f"{key}: {before.get(key)!r}, now {settings.get(key)!r}" for key in changed)
                )
        elif has_arms:
            raise ConfigError(
                f"{self._settings}: expected the settings of the arms next to it, found none; restore the file, or "
                "choose another run.folder"
            )
        if has_arms:
            self.read()

    def begin(self, settings: dict[str, Any]) -> None:
        """Creates the folder or drops an unfinished last line in it; raises as `check`. For one process."""
        self.check(settings)
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not self._settings.exists():  # first, so that arms always have settings
            atomic_write_text(self._settings, json.dumps(_as_read(settings), indent=1) + "\n")
        whole = "".join(self._whole_lines()) if self._path.exists() else None
        if whole is None or len(whole) < len(self._path.read_text(encoding="utf-8")):
            atomic_write_text(self._path, whole or "")

    def settings(self) -> dict[str, Any]:
        """Returns the settings that make the arms comparable.

        Raises:
            InputError: there is no such file, or it is broken.
        """
        try:
            return dict(parse_json(self._settings.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{self._settings}: expected the settings of an intervention's arms, cannot read them "
                f"({type(error).__name__}); restore the file, or train the arms again in another run.folder"
            ) from error

    def read(self) -> list[ArmResult]:
        """Returns all finished arms; ignores an unfinished last line, which a crash leaves.

        Raises:
            InputError: there is no such file, or one of its lines is broken.
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
            record = parse_json(line)
            return ArmResult(**{**record, "arm": Arm(**record["arm"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self._path}, line {number}: expected an arm, got a broken line ({error}); repair the line, or "
                "remove it and `megatron-tip diagnose intervene` trains that arm again"
            ) from error


def _as_read(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings as JSON restores them: lists for tuples."""
    return json.loads(json.dumps(settings))
