"""A retention ratio that follows the loss: AdaKD's loss-driven focusing (arXiv:2510.11615)."""

from dataclasses import dataclass

DECAY = 0.9
"""Of the moving average; AdaKD's page does not give one."""
TOLERANCE = 0.05
"""How far the average must move, as a share of its value at the last change."""
STEP = 0.05
FLOOR = 0.1


@dataclass(frozen=True)
class AdaptiveRatio:
    """The ratio of the next step, and what decides on it; plain numbers, which a checkpoint holds.

    `average`: the loss's moving average; `reference`: its value when the ratio last changed; None before any loss.
    """

    ratio: float
    average: float | None = None
    reference: float | None = None

    def after(self, loss: float) -> "AdaptiveRatio":
        """Returns the state after a step with this loss.

        The ratio falls to r (1 - 5 %), not below 0.1, once the average fell by 5 %, and rises to r (1 + 5 %), not above
        1, once it rose by 5 %. A ratio that begins below 0.1 does not fall.
        """
        if self.average is None or self.reference is None:
            return AdaptiveRatio(self.ratio, loss, loss)
        average = DECAY * self.average + (1 - DECAY) * loss
        if average < (1 - TOLERANCE) * self.reference:
            return AdaptiveRatio(max(min(FLOOR, self.ratio), self.ratio * (1 - STEP)), average, average)
        if average > (1 + TOLERANCE) * self.reference:
            return AdaptiveRatio(min(1.0, self.ratio * (1 + STEP)), average, average)
        return AdaptiveRatio(self.ratio, average, self.reference)
