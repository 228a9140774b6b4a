"""The scores of a checkpoint on a bank: one row per position, stored as Parquet in the bank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from megatron_tip.diagnostics.bank import ContextBank
from megatron_tip.diagnostics.parquet import read_about, read_table, write_table
from megatron_tip.errors import InputError
from megatron_tip.records import TokenIndex
from megatron_tip.statistics import STATISTICS, TokenStatistics

FORMAT = "megatron_tip bank scores 1"

_SCORED = {name: statistic for name, statistic in STATISTICS.items() if statistic.in_scores}
WHOLE = tuple(name for name, statistic in _SCORED.items() if statistic.over != "support")
"""Statistics that do not depend on K."""

SUPPORT = tuple(name for name, statistic in _SCORED.items() if statistic.over == "support")
"""Statistics of the top-K supports; a column for K = 16 is called, for example, "compatibility_k16"."""

_PLACE = ("context", "prompt", "position")
_ABOUT = ("bank", "checkpoint", "student", "teacher", "temperature", "support_sizes")


def column_names(support_sizes: Sequence[int]) -> list[str]:
    return [*WHOLE, *(f"{name}_k{size}" for size in support_sizes for name in SUPPORT)]


@dataclass(frozen=True)
class Scores:
    """Scores. `columns`: `[tokens]` float32 by name. `context`, `prompt`, `position`: `[tokens]` int64, as in the bank.

    `about`: the bank's checksum, the checkpoint, the fingerprints of student and teacher, the temperature, the support
    sizes, and the contexts that the checkpoint was trained on, if known; for the plain distillation of an intervention
    also the digest of its settings.
    """

    context: np.ndarray
    prompt: np.ndarray
    position: np.ndarray
    columns: dict[str, np.ndarray]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.context)

    @property
    def support_sizes(self) -> list[int]:
        return self.about["support_sizes"]

    def statistic(self, name: str, support_size: int) -> np.ndarray:
        """Returns the statistic, `[tokens]` float32, at `support_size` if it depends on K."""
        return self.columns[name if name in WHOLE else f"{name}_k{support_size}"]

    def statistics(self, support_size: int) -> TokenStatistics:
        """Returns all statistics at K = `support_size`, as the selection takes them."""
        if support_size not in self.support_sizes:
            raise InputError(f"support size: expected one of the scores' {self.support_sizes}, got {support_size}")
        values = {name: torch.from_numpy(self.statistic(name, support_size)) for name in (*WHOLE, *SUPPORT)}
        return TokenStatistics(**values)

    def token_index(self) -> TokenIndex:
        return TokenIndex(torch.from_numpy(self.context), torch.from_numpy(self.position))

    def without_contexts(self, contexts: Sequence[int]) -> "Scores":
        """Returns the rows of all other contexts."""
        kept = ~np.isin(self.context, np.asarray(contexts, dtype=np.int64))
        columns = {name: values[kept] for name, values in self.columns.items()}
        return Scores(self.context[kept], self.prompt[kept], self.position[kept], columns, self.about)


def scores_of(bank: ContextBank, columns: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Scores:
    """Returns the scores of all rows of `bank`, in its order."""
    context, position = bank.rows.T
    return Scores(context, bank.prompts[context], position, dict(columns), {**about, "bank": bank.sha256})


def write_scores(path: Path, scores: Scores) -> None:
    """Writes scores atomically; replaces older ones."""
    table = pa.table(
        {"context": scores.context, "prompt": scores.prompt, "position": scores.position, **scores.columns}
    )
    write_table(path, table, {**scores.about, "format": FORMAT}, setting="diagnostics.bank")


def about_in(path: Path) -> dict[str, Any]:
    """Returns `about` of the scores in `path` without reading columns. Raises InputError for a file of another kind."""
    return read_about(path, format_name=FORMAT)


def read_scores(path: Path, bank: ContextBank) -> Scores:
    """Returns the scores in `path`, which must belong to `bank`.

    Raises:
        InputError: there is no such file, or it is truncated, incomplete or belongs to another bank.
    """
    if not path.exists():
        existing = ", ".join(sorted(other.stem for other in path.parent.glob("*.parquet"))) or "none"
        raise InputError(
            f"{path}: expected the name of scores in the bank, got {path.stem!r}; existing: {existing}; "
            "`megatron-tip diagnose score` creates others"
        )
    table, about = read_table(path, format_name=FORMAT, columns=_PLACE, keys=_ABOUT)
    if about["bank"] != bank.sha256:
        raise InputError(
            f"{path}: expected scores of the bank {bank.folder} (SHA-256 {bank.sha256:.12}), got those of another one "
            f"({about['bank']:.12}); score the checkpoint on this bank"
        )
    odd = [
        field.name
        for field in table.schema
        if not (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
        or table.column(field.name).null_count
    ]
    if odd:
        raise InputError(f"{path}: expected numbers in every row, got others in {', '.join(odd)}; score it again")
    columns = {name: table.column(name).to_numpy().copy() for name in table.column_names}  # torch needs writable arrays
    lacking = [name for name in column_names(about["support_sizes"]) if name not in columns]
    context, prompt, position = (columns.pop(name) for name in _PLACE)
    if lacking or not np.array_equal(np.stack([context, position], axis=1), bank.rows):
        raise InputError(
            f"{path}: expected {len(bank.rows)} rows, one per token of {bank.folder} in its order, with every "
            f"statistic at K = {about['support_sizes']}, got {len(table)} rows without {lacking or 'that order'}; "
            "score the checkpoint again"
        )
    return Scores(context, prompt, position, columns, about)
