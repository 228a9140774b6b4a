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
from megatron_tip.diagnostics.statistics.regression import decompose
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
        table = evidence.table(size)
        gap = decompose(table.frame, resamples).gap
        yield Claim(f"D^L predicts the gain better than D^I, K = {size}", "TA-OPD table 9", gap)
    for size in evidence.support_sizes:
        gap = support_gap(evidence.table(size), "compatibility", resamples)
        text = f"within Q3, tokens with high C gain more than those with low C, K = {size}"
        yield Claim(text, "TA-OPD tables 1, 6", gap.bootstrap)
        yield Claim(f"{text}; matched on prompt, H, D, position", "TA-OPD table 1", gap.matched)
    size = evidence.main_support_size
    table, (scores, resamples) = evidence.table(size), evidence.untrained
    kept = {
        name: selected_rows(scores, size, f"ta_opd_{name}", 0.05, seed=evidence.seed)
        for name in ("teachability", "divergence")
    }
    gain = table.column("gain")
    text = "the 5 % with the highest D^L gain more than the 5 % with the highest D, under the common update"
    yield Claim(text, "TA-OPD table 8", resamples.gap(gain, kept["teachability"], kept["divergence"]))
    random = selected_rows(scores, size, "random", 0.05, seed=evidence.seed)
    yield Claim("random tokens lose, under the common update", "TA-OPD table 8", resamples.mean(gain, random), sign=-1)


def arm_claims(evidence: Evidence) -> Iterator[Claim]:
    """Those about what training on selected tokens gives on held-out contexts."""
    size = evidence.main_support_size
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

    best = "ta_opd_teachability"
    for ratio in (0.03, 0.05):
        for rule, name in BEATEN.items():
            text = f"teachability at {100 * ratio:g} % gains more than {name}"
            yield Claim(text, "TA-OPD table 2", difference((best, ratio), (rule, ratio)))
    yield Claim(
        "teachability at 5 % gains at least what all tokens do",
        "TA-OPD table 3",
        difference((best, 0.05), ("full", 1.0)),
    )
    yield Claim("teachability gains more at 3 % than at 10 %", "TA-OPD table 10", difference((best, 0.03), (best, 0.1)))
    high, low = "ta_opd_q3_high_teachability", "ta_opd_q3_low_teachability"
    yield Claim(
        "within Q3, high D^L gains more than low D^L, at 3 %", "TA-OPD table 7", difference((high, 0.03), (low, 0.03))
    )
    text = "TIP's soft-OR gains more than its bottom, at 10 %"
    yield Claim(text, "TIP, contrast", difference(("tip_soft_or", 0.1), ("tip_soft_or_bottom", 0.1)))
    text = "TIP's Q3-only gains more than random tokens, at 10 %"
    yield Claim(text, "TIP", difference(("tip_q3_only", 0.1), ("random", 0.1)))
