"""The fixed-context gain between two checkpoints: how much closer to the teacher the second is on the same text."""

from dataclasses import dataclass

import numpy as np

from megatron_tip.diagnostics.scores import Scores
from megatron_tip.errors import InputError


@dataclass(frozen=True)
class Gain:
    """The gain of each token.

    `tokens`: `[tokens]` float64 nats, G_t = KL(q || p_before) - KL(q || p_after) (TA-OPD Eq. 1), at the positions of
    `before`, the rows that both scores share. `relative`: mean gain over mean KL before; NaN where that is 0.
    """

    before: Scores
    tokens: np.ndarray
    relative: float

    @property
    def mean(self) -> float:
        return float(self.tokens.mean())


def gain_between(before: Scores, after: Scores) -> Gain:
    """Returns the gain from one checkpoint to another, on the contexts that neither lists as trained on.

    Raises:
        InputError: the scores are of different banks, teachers or temperatures, or no context is left.
    """
    for key, meaning in (("bank", "bank"), ("teacher", "teacher"), ("temperature", "temperature")):
        if before.about[key] != after.about[key]:
            raise InputError(
                f"gain: expected scores of one {meaning}, got {before.about[key]!r} and {after.about[key]!r}; score "
                "both checkpoints with the same configuration"
            )
    trained = [*before.about.get("trained_contexts", []), *after.about.get("trained_contexts", [])]
    start, end = before.without_contexts(trained), after.without_contexts(trained)
    if not len(start):
        raise InputError("gain: expected contexts that neither checkpoint was trained on, got none; make a larger bank")
    first, second = (scores.columns["forward_kl"].astype(np.float64) for scores in (start, end))
    mean = first.mean()
    return Gain(start, first - second, float((first - second).mean() / mean) if mean else float("nan"))
