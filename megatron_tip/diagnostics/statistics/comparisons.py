"""Gaps and curves: high against low support within Q3, matched by prompt; gain by bucket."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.spatial import KDTree

from megatron_tip.diagnostics.statistics.bootstrap import Interval, PromptResamples
from megatron_tip.diagnostics.statistics.tokens import BankTokens

MATCHED_ON = ("h", "d", "position")


@dataclass(frozen=True)
class SupportGap:
    """The mean gain of tokens with high support minus that of tokens with low support, within Q3.

    High is above the median of Q3. `matched`: over pairs within a prompt, each high token with the low token nearest to
    it in standardised H, D and position. `num_tokens`: in Q3; 0 if the quadrant is empty.
    """

    bootstrap: Interval
    matched: Interval
    num_tokens: int


def support_gap(table: BankTokens, proxy: str, resamples: PromptResamples) -> SupportGap:
    """Returns the gap by one support proxy, a column of the table; unknown if all of Q3 has one value."""
    in_q3 = table.quadrant("q3")
    values, gain = table.column(proxy), table.column("gain")
    if not in_q3.any():
        return SupportGap(Interval.unknown(), Interval.unknown(), 0)
    high, low = split_high(values, in_q3)
    return SupportGap(resamples.gap(gain, high, low), matched_gap(table.frame, high, low, resamples), int(in_q3.sum()))


def split_high(values: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two masks, `[tokens]` bool: above the median of the tokens `among`, and the rest of them.

    If nothing is above it (half of them share the largest value), high is the median itself.
    """
    median = np.median(values[among])
    high = among & (values > median)
    if not high.any():
        high = among & (values >= median)
    return high, among & ~high


def matched_gap(frame: pd.DataFrame, high: np.ndarray, low: np.ndarray, resamples: PromptResamples) -> Interval:
    """Returns the mean gain difference within pairs of one prompt, matched on H, D and position, with replacement."""
    raw = frame[list(MATCHED_ON)].to_numpy(dtype=np.float64)
    points = raw / np.where(raw.std(axis=0) > 0, raw.std(axis=0), 1.0)
    gain, prompts = frame["gain"].to_numpy(), frame["prompt"].to_numpy()
    difference, paired = np.zeros(len(frame)), np.zeros(len(frame), dtype=bool)
    for prompt in np.intersect1d(prompts[high], prompts[low]):
        own_high, own_low = (np.flatnonzero(side & (prompts == prompt)) for side in (high, low))
        _, nearest = KDTree(points[own_low]).query(points[own_high])
        difference[own_high] = gain[own_high] - gain[own_low[nearest]]
        paired[own_high] = True
    return resamples.mean(difference, paired)


def bucket_curve(
    values: np.ndarray, gain: np.ndarray, resamples: PromptResamples, *, num_buckets: int = 10
) -> pd.DataFrame:
    """Returns the mean gain by bucket of `values`, cut at its quantiles: `bucket` numbers the tenths from 1 to 10.

    Tokens of equal value share the highest of their buckets; buckets left empty by ties are omitted.

    Columns: bucket, value (mean), tokens, gain, low, high.
    """
    edges = np.quantile(values, np.linspace(0, 1, num_buckets + 1))
    bucket = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, num_buckets - 1)
    rows = []
    for number in np.unique(bucket):
        own = bucket == number
        found = resamples.mean(gain, own)
        rows.append(
            {
                "bucket": int(number) + 1,
                "value": float(values[own].mean()),
                "tokens": int(own.sum()),
                "gain": found.estimate,
                "low": found.low,
                "high": found.high,
            }
        )
    return pd.DataFrame(rows)
