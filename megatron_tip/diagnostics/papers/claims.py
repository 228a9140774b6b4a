"""The papers' claims that a bank can test, each with what was found and whether it agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from megatron_tip.diagnostics.arms import ArmResult
from megatron_tip.diagnostics.papers.arm_tables import pooled_gain
from megatron_tip.diagnostics.papers.evidence import Evidence
from megatron_tip.diagnostics.statistics.bootstrap import Interval
from megatron_tip.diagnostics.statistics.comparisons import support_gap
from megatron_tip.diagnostics.statistics.tokens import selected_rows

BEATEN = {
    "random": "random tokens",
    "ta_opd_divergence": "raw KL (D~)",
    "ta_opd_incompatible": "incompatible disagreement (D^I)",
    "ta_opd_soft_or": "TIP's soft-OR in TA-OPD's form",
    "tip_soft_or": "TIP's soft-OR",
    "ta_opd_entropy": "entropy",
    "ta_opd_q3_only": "Q3 alone",
    "ta_opd_q3_high_compatibility": "Q3 with high C",
}

_Q3_SIDES = ("ta_opd_q3_high_teachability", "ta_opd_q3_low_teachability")


@dataclass(frozen=True)
class Claim:
    """What a paper says is above 0 (`sign` 1) or below (-1), and what was found of it."""

    text: str
    source: str
    found: Interval
    sign: int = 1

    @property
    def verdict(self) -> str:
        """agrees or disagrees where the interval lies on one side of 0; undecided elsewhere."""
        if not self.found.excludes_zero:
            return "undecided" if np.isfinite(self.found.estimate) else "no data"
        return "agrees" if np.sign(self.found.low) == self.sign else "disagrees"


def claims(evidence: Evidence) -> pd.DataFrame:
    """Every claim with its difference in nats, the interval and the verdict."""
    found = [*token_claims(evidence), *arm_claims(evidence)]
    return pd.DataFrame(
        [
            {
                "claim": claim.text,
                "source": claim.source,
                "difference": claim.found.estimate,
                "low": claim.found.low,
                "high": claim.found.high,
                "verdict": claim.verdict,
            }
            for claim in found
        ]
    )


def token_claims(evidence: Evidence) -> Iterator[Claim]:
    """Those about the gain of tokens under a common update."""
    _, resamples = evidence.untrained
    for size in evidence.support_sizes:
        text = f"D^L predicts the gain better than D^I, K = {size}"
        yield Claim(text, "TA-OPD table 9", evidence.decomposition(size).gap)
    for size in evidence.support_sizes:
        gap = support_gap(evidence.table(size), "compatibility", resamples)
        text = f"within Q3, tokens with high C gain more than those with low C, K = {size}"
        yield Claim(text, "TA-OPD tables 1, 6", gap.bootstrap)
        yield Claim(f"{text}; matched on prompt, H, D, position", "TA-OPD table 1", gap.matched)
    size, ratio = evidence.main_support_size, evidence.main_ratio
    table, (scores, resamples) = evidence.table(size), evidence.untrained
    kept = {
        name: selected_rows(scores, size, f"ta_opd_{name}", ratio, seed=evidence.seed)
        for name in ("teachability", "divergence")
    }
    gain = table.column("gain")
    share = f"{100 * ratio:g} %"
    text = f"the {share} with the highest D^L gain more than the {share} with the highest D, under the common update"
    yield Claim(text, "TA-OPD table 8", resamples.gap(gain, kept["teachability"], kept["divergence"]))
    random = selected_rows(scores, size, "random", ratio, seed=evidence.seed)
    yield Claim("random tokens lose, under the common update", "TA-OPD table 8", resamples.mean(gain, random), sign=-1)


def arm_claims(evidence: Evidence) -> Iterator[Claim]:
    """Those about what training on selected tokens gives on held-out contexts, at the study's own K.

    A paper's budget that was not tried gives way to the study's own; a claim whose arms are missing has no data.
    """
    size = evidence.arms_support_size
    arms: dict[tuple[str, float], dict[int, ArmResult]] = {}
    for result in evidence.arms:
        if result.arm.support_size == size:
            arms.setdefault((result.arm.rule, result.arm.retention_ratio), {})[result.arm.seed] = result

    def difference(first: tuple[str, float], second: tuple[str, float]) -> Interval:
        own, other = arms.get(first, {}), arms.get(second, {})
        seeds = sorted(own.keys() & other.keys())
        if not seeds:
            return Interval.unknown()
        return pooled_gain([own[seed] for seed in seeds], evidence, [other[seed] for seed in seeds])

    best, main = "ta_opd_teachability", evidence.main_ratio
    for ratio in evidence.main_ratios:
        for rule, name in BEATEN.items():
            text = f"teachability at {100 * ratio:g} % gains more than {name}"
            yield Claim(text, "TA-OPD table 2", difference((best, ratio), (rule, ratio)))
    text = f"teachability at {100 * main:g} % gains at least what all tokens do"
    yield Claim(text, "TA-OPD table 3", difference((best, main), ("full", 1.0)))
    yield Claim("teachability gains more at 3 % than at 10 %", "TA-OPD table 10", difference((best, 0.03), (best, 0.1)))
    for text, source, high, low, paper in (
        ("within Q3, high D^L gains more than low D^L", "TA-OPD table 7", *_Q3_SIDES, 0.03),
        ("TIP's soft-OR gains more than its bottom", "TIP, contrast", "tip_soft_or", "tip_soft_or_bottom", 0.1),
        ("TIP's Q3-only gains more than random tokens", "TIP", "tip_q3_only", "random", 0.1),
    ):
        ratio = evidence.nearest_ratio(paper)
        yield Claim(f"{text}, at {100 * ratio:g} %", source, difference((high, ratio), (low, ratio)))
