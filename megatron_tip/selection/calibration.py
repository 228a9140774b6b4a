"""Order statistics that one step's exact selection passes on to a selection that cannot see its whole batch."""

from dataclasses import dataclass

from megatron_tip.selection.budget import Threshold
from megatron_tip.selection.order_statistics import Quantiles


@dataclass(frozen=True)
class BatchTotals:
    """Row counts of the whole batch, known before any row is scored: valid, and to be selected."""

    num_valid: int
    num_selected: int


@dataclass(frozen=True)
class Calibration:
    """The order statistics of an earlier batch, as plain numbers that a checkpoint can hold.

    `quantiles`: (statistic, probability, value) rows. `threshold`: the lowest kept score. `tie_share`: the share kept
    of the rows with exactly that score.
    """

    quantiles: tuple[tuple[str, float, float], ...]
    threshold: float
    tie_share: float

    @staticmethod
    def of(quantiles: Quantiles, threshold: Threshold) -> "Calibration":
        rows = tuple((name, probability, value) for (name, probability), value in sorted(quantiles.items()))
        return Calibration(rows, threshold.score, threshold.num_tied / threshold.num_equal)

    def as_quantiles(self) -> Quantiles:
        return {(name, probability): value for name, probability, value in self.quantiles}
