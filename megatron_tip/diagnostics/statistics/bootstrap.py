"""Prompt-cluster bootstrap: prompts are drawn with replacement, all tokens of a prompt together.

Tokens of one prompt are not independent, so intervals that resample tokens are too narrow. Everything here is built
from sums within prompts, so a resample costs one row of a small matrix product, not a pass over the tokens.
"""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the percentile interval of its resamples.

    All NaN if nothing could be estimated; only the bounds are NaN if there is a single prompt.
    """

    estimate: float
    low: float
    high: float
    num_tokens: int = 0

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @staticmethod
    def unknown() -> "Interval":
        return Interval(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class PromptResamples:
    """Resamples of prompts.

    `weights`: `[resamples, prompts]` float64, how often each prompt was drawn. `place`: `[tokens]`, each token's
    prompt.
    """

    weights: np.ndarray
    place: np.ndarray

    @staticmethod
    def draw(prompts: np.ndarray, *, resamples: int = 1000, seed: int = 1) -> "PromptResamples":
        """Draws as many prompts as exist, with replacement, `resamples` times; a pure function of its arguments.

        Args:
            prompts: `[tokens]`, each token's prompt.
        """
        names, place = np.unique(prompts, return_inverse=True)
        draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        return PromptResamples(draws.astype(np.float64), place)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Returns `[resamples, k]`, the sums of the columns of `values` `[tokens, k]` over each resample's tokens."""
        by_prompt = np.zeros((self.weights.shape[1], values.shape[1]))
        np.add.at(by_prompt, self.place, values)
        return self.weights @ by_prompt

    def num_prompts(self, kept: np.ndarray | None = None) -> int:
        """Returns the number of prompts among the `kept` tokens, or all.

        A single prompt resamples into itself and tells nothing of others.
        """
        return len(np.unique(self.place if kept is None else self.place[kept]))

    def mean(self, values: np.ndarray, kept: np.ndarray | None = None) -> Interval:
        """Returns the mean of `values` `[tokens]` over the `kept` tokens; without bounds if they are of one prompt."""
        mask = np.ones(len(values), dtype=bool) if kept is None else kept
        if not mask.any():
            return Interval.unknown()
        if self.num_prompts(mask) < 2:
            return without_spread(float(values[mask].mean()), int(mask.sum()))
        sums = self.sums(np.stack([np.where(mask, values, 0.0), mask], axis=1))
        with np.errstate(invalid="ignore", divide="ignore"):
            return interval_of(float(values[mask].mean()), sums[:, 0] / sums[:, 1], int(mask.sum()))

    def gap(self, values: np.ndarray, high: np.ndarray, low: np.ndarray) -> Interval:
        """Returns the mean of `values` where `high` holds minus that where `low` holds; unknown if one is empty.

        Without bounds if one of them is of a single prompt.
        """
        if not (high.any() and low.any()):
            return Interval.unknown()
        estimate = float(values[high].mean() - values[low].mean())
        if min(self.num_prompts(high), self.num_prompts(low)) < 2:
            return without_spread(estimate, int(high.sum() + low.sum()))
        columns = [np.where(high, values, 0.0), high, np.where(low, values, 0.0), low]
        sums = self.sums(np.stack(columns, axis=1).astype(np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            gaps = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
        return interval_of(estimate, gaps, int(high.sum() + low.sum()))


def without_spread(estimate: float, num_tokens: int) -> Interval:
    """Returns an estimate without bounds, since nothing tells its spread over other prompts."""
    return Interval(estimate, float("nan"), float("nan"), num_tokens)


def interval_of(estimate: float, resampled: np.ndarray, num_tokens: int = 0) -> Interval:
    """Returns the percentile interval of the resampled estimates, without those that had no token to estimate from."""
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return without_spread(estimate, num_tokens)
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(estimate, float(low), float(high), num_tokens)
