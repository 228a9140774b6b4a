"""The data behind the tables: a bank, its start, the checkpoints after it, and the arms of an intervention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_tip.diagnostics.arms import ArmResult, ArmsFile, settings_digest
from megatron_tip.diagnostics.bank import ContextBank, read_bank, strangers
from megatron_tip.diagnostics.gain import Gain, gain_between
from megatron_tip.diagnostics.scores import Scores, read_scores
from megatron_tip.diagnostics.statistics.bootstrap import PromptResamples
from megatron_tip.diagnostics.statistics.comparisons import SupportGap, support_gap
from megatron_tip.diagnostics.statistics.regression import Decomposition, decompose
from megatron_tip.diagnostics.statistics.seeds import MIN_SEEDS
from megatron_tip.diagnostics.statistics.tokens import BankTokens, bank_tokens, mean_gain
from megatron_tip.errors import InputError


@dataclass(frozen=True)
class Evidence:
    """The data behind the tables. `gains`: by the name of the scores after. `arms`: of an intervention, or none.

    `trainings`: the names of `gains` that an intervention left, trainings that differ in their seed alone.

    The token tables cover the positions that no checkpoint was trained on; their gain is the mean over the checkpoints.
    """

    bank: ContextBank
    start: Scores
    gains: dict[str, Gain]
    arms: list[ArmResult]
    resamples: int = 1000
    seed: int = 1
    trainings: tuple[str, ...] = ()
    _tables: dict[int, BankTokens] = field(default_factory=dict)
    _decompositions: dict[int, Decomposition] = field(default_factory=dict)
    _support_gaps: dict[tuple[int, str], SupportGap] = field(default_factory=dict)

    @staticmethod
    def read(
        folder: Path, *, start: str, after: Sequence[str], arms: Path | None, resamples: int, seed: int
    ) -> "Evidence":
        """Reads the evidence from files.

        Args:
            after: names of scores; empty: all in the bank but the start. arms: the folder of an intervention.

        Raises:
            InputError: something is missing, damaged, or belongs to another bank, start, teacher or temperature.
        """
        bank = read_bank(folder)
        before = read_scores(bank.scores_path(start), bank)
        names = after or sorted(
            path.stem for path in bank.scores_path(start).parent.glob("*.parquet") if path.stem != start
        )
        after_scores = {name: read_scores(bank.scores_path(name), bank) for name in names}
        gains = {name: gain_between(before, scores) for name, scores in after_scores.items()}
        done = _read_arms(ArmsFile(arms), bank, before, after_scores) if arms is not None else []
        if all(result.arm.rule == "full" for result in done):  # ended early: nothing to compare yet
            done = []
        trainings = tuple(name for name, scores in after_scores.items() if "settings" in scores.about)
        return Evidence(bank, before, gains, done, resamples, seed, trainings)

    def by_training(self) -> list["Evidence"]:
        """Returns the evidence after each training alone, without intervals.

        Checkpoints that no intervention left count as one training: nothing says that they are not of one run.
        """
        own = [{name: self.gains[name]} for name in self.trainings] or [self.gains]
        return [Evidence(self.bank, self.start, gains, self.arms, resamples=1, seed=self.seed) for gains in own]

    @property
    def num_trainings(self) -> int:
        """The smaller of two numbers: seeds of the arms, and trainings behind the checkpoints after the start."""
        seeds = [len({result.arm.seed for result in self.arms})] if self.arms else []
        return min([len(self.by_training()), *seeds])

    @cached_property
    def _mean_gain(self) -> tuple[Scores, np.ndarray]:
        return mean_gain(list(self.gains.values()))

    @cached_property
    def untrained(self) -> tuple[Scores, PromptResamples]:
        """The start's scores of the tokens that no checkpoint was trained on, and the resamples of their prompts."""
        scores, _ = self._mean_gain
        return scores, PromptResamples.draw(scores.prompt, resamples=self.resamples, seed=self.seed)

    @property
    def support_sizes(self) -> list[int]:
        return self.start.support_sizes

    @property
    def arms_support_size(self) -> int | None:
        """The study's own K, `selection.support_size`, from the first arm, plain distillation."""
        return self.arms[0].arm.support_size if self.arms else None

    @property
    def main_support_size(self) -> int:
        """The K of the token tables that need one: the study's; 16 without arms, or if it was not scored."""
        wanted = [size for size in (self.arms_support_size, 16) if size in self.support_sizes]
        return wanted[0] if wanted else self.support_sizes[0]

    @property
    def main_ratio(self) -> float:
        """The study's own budget, `selection.retention_ratio`: the first one tried; 5 % without arms."""
        budgets = [result.arm.retention_ratio for result in self.arms if result.arm.rule != "full"]
        return budgets[0] if budgets else 0.05

    def tried_ratio(self, ratio: float) -> float:
        """Returns the paper's budget `ratio` if it was tried or there are no arms, else the study's own."""
        tried = {result.arm.retention_ratio for result in self.arms}
        return ratio if not tried or ratio in tried else self.main_ratio

    @property
    def main_ratios(self) -> list[float]:
        """The budgets of the tables with few: the study's own, and the papers' 3 and 5 % if they were tried."""
        return sorted({self.main_ratio, self.tried_ratio(0.03), self.tried_ratio(0.05)})

    def table(self, support_size: int) -> BankTokens:
        if support_size not in self._tables:
            self._tables[support_size] = bank_tokens(*self._mean_gain, support_size)
        return self._tables[support_size]

    def decomposition(self, support_size: int) -> Decomposition:
        if support_size not in self._decompositions:
            _, resamples = self.untrained
            self._decompositions[support_size] = decompose(self.table(support_size).frame, resamples)
        return self._decompositions[support_size]

    def support_gap(self, support_size: int, proxy: str) -> SupportGap:
        key = support_size, proxy
        if key not in self._support_gaps:
            _, resamples = self.untrained
            self._support_gaps[key] = support_gap(self.table(support_size), proxy, resamples)
        return self._support_gaps[key]

    def caveats(self) -> list[str]:
        """Returns what a reader of the numbers must know, one sentence each."""
        about = self.start.about
        found = strangers(self.bank, student=about["student"], teacher=about["teacher"])
        if (size := self.arms_support_size) is not None and size not in self.support_sizes:
            found.append(
                f"the start was not scored at the arms' K = {size}: tables of tokens are at K = "
                f"{self.main_support_size}"
            )
        sizes = {result.arm.support_size for result in self.arms}
        if self.arms and (missing := [str(size) for size in self.support_sizes if size not in sizes]):
            found.append(f"no arm was tried at K = {', '.join(missing)}")
        if missing := [f"{100 * ratio:g} %" for ratio in (0.03, 0.05, 0.1) if self.tried_ratio(ratio) != ratio]:
            found.append(
                f"no arm was tried at {', '.join(missing)}: the papers' claims there are tested at the main budget"
            )
        if (number := self.num_trainings) < MIN_SEEDS:
            found.append(f"too few seeds ({number} of {MIN_SEEDS}) for a verdict on a claim")
        return found


def _read_arms(file: ArmsFile, bank: ContextBank, start: Scores, after: Mapping[str, Scores]) -> list[ArmResult]:
    """Returns the arms in `file`.

    Raises:
        InputError: they belong to another bank, began from another student than `start` scored, or differ in settings
            from the intervention that left the scores `after`.
    """
    settings, about = file.settings(), start.about
    wanted = {"bank": bank.sha256, "student": about["student"], "teacher": about["teacher"]}
    found = {key: settings.get(key) for key in wanted}
    wanted["temperature"], found["temperature"] = about["temperature"], (settings.get("loss") or {}).get("temperature")
    digest = settings_digest(settings)
    for name, scores in after.items():
        wanted[f"settings of {name}"], found[f"settings of {name}"] = scores.about.get("settings", digest), digest
    other = [f"{key} {value!s:.12}, got {found[key]!s:.12}" for key, value in wanted.items() if found[key] != value]
    if other:
        raise InputError(
            f"{file.folder}: expected arms that belong to the bank {bank.folder} and its scores: {'; '.join(other)}; "
            "give the arms (--arms) and scores (--start, AFTER) that were made together"
        )
    return file.read()
