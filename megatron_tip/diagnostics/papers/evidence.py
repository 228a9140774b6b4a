"""What the tables are made of: a bank, its start, the checkpoints after it, and the arms of an intervention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_tip.diagnostics.arms import ArmResult, ArmsFile
from megatron_tip.diagnostics.bank import ContextBank, read_bank
from megatron_tip.diagnostics.gain import Gain, gain_between
from megatron_tip.diagnostics.scores import Scores, read_scores
from megatron_tip.diagnostics.statistics.bootstrap import PromptResamples
from megatron_tip.diagnostics.statistics.tokens import TokenTable, mean_gain, token_table


@dataclass(frozen=True)
class Evidence:
    """`gains`: by name of the scores after. `arms`: of an intervention, or none.

    The tables of tokens are over those positions that no checkpoint was trained on; their gain is the mean over the
    checkpoints.
    """

    bank: ContextBank
    start: Scores
    gains: dict[str, Gain]
    arms: list[ArmResult]
    resamples: int = 1000
    seed: int = 1
    _tables: dict[int, TokenTable] = field(default_factory=dict)

    @staticmethod
    def read(
        folder: Path, *, start: str, after: Sequence[str], arms: Path | None, resamples: int, seed: int
    ) -> Evidence:
        """Reads it all.

        Args:
            after: names of scores; none: all in the bank but the start. arms: the folder of an intervention.

        Raises:
            InputError: something is missing, damaged, or belongs to another bank, teacher or temperature.
        """
        bank = read_bank(folder)
        before = read_scores(bank.scores_path(start), bank)
        names = after or sorted(
            path.stem for path in bank.scores_path(start).parent.glob("*.parquet") if path.stem != start
        )
        gains = {name: gain_between(before, read_scores(bank.scores_path(name), bank)) for name in names}
        done = ArmsFile(arms).read() if arms is not None else []
        if all(result.arm.rule == "full" for result in done):  # an early end: there is nothing to compare yet
            done = []
        return Evidence(bank, before, gains, done, resamples, seed)

    @cached_property
    def untrained(self) -> tuple[Scores, PromptResamples]:
        """The start's scores of the tokens that count, and the resamples of their prompts."""
        scores, _ = mean_gain(list(self.gains.values()))
        return scores, PromptResamples.draw(scores.prompt, resamples=self.resamples, seed=self.seed)

    @property
    def support_sizes(self) -> list[int]:
        return self.start.support_sizes

    @property
    def main_support_size(self) -> int:
        """The K of the tables that have one: 16, the paper's, where it was scored."""
        return 16 if 16 in self.support_sizes else self.support_sizes[0]

    def table(self, support_size: int) -> TokenTable:
        if support_size not in self._tables:
            scores, gain = mean_gain(list(self.gains.values()))
            self._tables[support_size] = token_table(scores, gain, support_size)
        return self._tables[support_size]
