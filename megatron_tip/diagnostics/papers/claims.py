"""The papers' claims that a bank can test, each with the finding and the verdict."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from megatron_tip.diagnostics.arms import ArmResult
from megatron_tip.diagnostics.papers.arm_tables import pooled_gain
from megatron_tip.diagnostics.papers.evidence import Evidence
from megatron_tip.diagnostics.statistics.bootstrap import LEVEL, Interval
from megatron_tip.diagnostics.statistics.seeds import MIN_SEEDS, holm, seed_p_value
from megatron_tip.diagnostics.statistics.tokens import selected_rows

TABLE_2 = (
    ("random", "random tokens", (0.03, 0.05)),
    ("ta_opd_divergence", "raw KL (D~)", (0.03, 0.05)),
    ("ta_opd_incompatible", "incompatible disagreement (D^I)", (0.03,)),
    ("ta_opd_soft_or", "TIP's soft-OR in TA-OPD's form", (0.03, 0.05)),
    ("ta_opd_entropy_teachability", "entropy + teachability", (0.03, 0.05)),
    ("ta_opd_entropy", "entropy", (0.03, 0.05)),
    ("ta_opd_q3_high_compatibility", "Q3 with high C", (0.03, 0.05)),
    ("ta_opd_q3_low_compatibility", "Q3 with low C", (0.03,)),
    ("ta_opd_q3_only", "Q3 alone", (0.03, 0.05)),
)
"""The rules below teachability in TA-OPD's table 2, and the budgets at which it lists them."""

BEST = "ta_opd_teachability"

OTHERS = (
    ("teachability gains at least what all tokens do", "TA-OPD table 3, in accuracy", BEST, "full", 0.1),
    (
        "within Q3, high D^L gains more than low D^L",
        "TA-OPD table 7",
        "ta_opd_q3_high_teachability",
        "ta_opd_q3_low_teachability",
        0.03,
    ),
    (
        "TIP's Q3-only gains what all tokens do",
        "TIP abstract: nearly, in accuracy",
        "tip_q3_only",
        "full",
        0.1,
    ),
    ("TIP's Q3-only gains more than random tokens", "contrast of ours", "tip_q3_only", "random", 0.1),
    ("TIP's soft-OR gains more than its bottom", "contrast of ours", "tip_soft_or", "tip_soft_or_bottom", 0.1),
)
"""The claim, its source, the rule that should gain more, the other rule, and the budget."""


@dataclass(frozen=True)
class Claim:
    """A quantity that a paper claims to be above 0 (`sign` 1) or below (-1), and the finding.

    `found`: over prompts. `seeds`: the same for each training behind it.
    """

    text: str
    source: str
    found: Interval
    seeds: tuple[float, ...]
    sign: int = 1

    @property
    def p_value(self) -> float:
        """The two-sided p over trainings; NaN below `MIN_SEEDS`."""
        return seed_p_value(self.seeds) if len(self.seeds) >= MIN_SEEDS else float("nan")

    def verdict(self, adjusted_p: float) -> str:
        """Returns agrees or disagrees if prompts and trainings differ from 0 in one direction, else undecided.

        Without an estimate or with fewer than `MIN_SEEDS` trainings there is no verdict, and the word says why.

        Args:
            adjusted_p: the `p_value`, corrected for the other claims that are judged beside this one.
        """
        if not np.isfinite(self.found.estimate):
            return "no data"
        if len(self.seeds) < MIN_SEEDS:
            return f"too few seeds ({len(self.seeds)} of {MIN_SEEDS})"
        side = np.sign(self.found.estimate)
        if not (self.found.excludes_zero and adjusted_p <= 1 - LEVEL and np.sign(np.mean(self.seeds)) == side):
            return "undecided"
        return "agrees" if side == self.sign else "disagrees"


def claims(evidence: Evidence) -> pd.DataFrame:
    """Returns every claim with its difference in nats, its interval over prompts, each training, and the verdict.

    `p_holm`: over trainings, corrected by Holm's method for all claims of the table.
    """
    found = [*token_claims(evidence), *arm_claims(evidence)]
    adjusted = holm([claim.p_value for claim in found])
    return pd.DataFrame(
        [
            {
                "claim": claim.text,
                "source": claim.source,
                "difference": claim.found.estimate,
                "low": claim.found.low,
                "high": claim.found.high,
                "by_seed": " ".join(f"{value:+.3g}" for value in claim.seeds),
                "p_holm": p_holm,
                "verdict": claim.verdict(p_holm),
            }
            for claim, p_holm in zip(found, adjusted, strict=True)
        ]
    )


def token_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields the claims about the gain of tokens under a common update, with the estimate after each update alone."""
    each = [[claim.found.estimate for claim in _token_claims(alone)] for alone in evidence.by_training()]
    for place, claim in enumerate(_token_claims(evidence)):
        yield replace(claim, seeds=tuple(estimates[place] for estimates in each))


def _token_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields the claims over the evidence's mean update."""
    for size in evidence.support_sizes:
        text = f"D^L predicts the gain better than D^I, K = {size}"
        yield Claim(text, "TA-OPD table 9", evidence.decomposition(size).gap, ())
    for size in evidence.support_sizes:
        gap = evidence.support_gap(size, "compatibility")
        text = f"within Q3, tokens with high C gain more than those with low C, K = {size}"
        yield Claim(text, "TA-OPD tables 1, 6", gap.bootstrap, ())
        yield Claim(f"{text}; matched on prompt, H, D, position", "TA-OPD table 1", gap.matched, ())
    size, ratio = evidence.main_support_size, evidence.main_ratio
    table, (scores, resamples) = evidence.table(size), evidence.untrained
    kept = {
        name: selected_rows(scores, size, f"ta_opd_{name}", ratio, seed=evidence.seed)
        for name in ("teachability", "divergence")
    }
    gain = table.column("gain")
    share = f"{100 * ratio:g} %"
    text = f"the {share} with the highest D^L gain more than the {share} with the highest D, under the common update"
    yield Claim(text, "TA-OPD table 8", resamples.gap(gain, kept["teachability"], kept["divergence"]), ())
    random = selected_rows(scores, size, "random", ratio, seed=evidence.seed)
    text = "random tokens lose, under the common update"
    yield Claim(text, "TA-OPD table 8", resamples.mean(gain, random), (), sign=-1)


def arm_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields the claims about the gain on held-out contexts from training on selected tokens, at the study's own K.

    A paper's budget that was not tried is replaced by the study's own; a claim without its arms has no data.
    """
    compared = _Compared(evidence)
    budgets = {
        (rule, name): dict.fromkeys(evidence.tried_ratio(ratio) for ratio in papers) for rule, name, papers in TABLE_2
    }
    for ratio in sorted({ratio for tried in budgets.values() for ratio in tried}):
        for (rule, name), tried in budgets.items():
            if ratio in tried:
                text = f"teachability at {100 * ratio:g} % gains more than {name}"
                yield compared.claim(text, "TA-OPD table 2", (BEST, ratio), (rule, ratio))
    text = "teachability gains more at 3 % than at 10 %"
    yield compared.claim(text, "TA-OPD table 10", (BEST, 0.03), (BEST, 0.1))
    for text, source, rule, other, paper in OTHERS:
        ratio = evidence.tried_ratio(paper)
        below = (other, 1.0 if other == "full" else ratio)
        yield compared.claim(f"{text}, at {100 * ratio:g} %", source, (rule, ratio), below)


class _Compared:
    """The arms at the study's own K, compared by rule and budget, seed by seed."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._arms: dict[tuple[str, float], dict[int, ArmResult]] = {}
        for result in evidence.arms:
            arm = result.arm
            if arm.support_size == evidence.arms_support_size:
                self._arms.setdefault((arm.rule, arm.retention_ratio), {})[arm.seed] = result

    def claim(self, text: str, source: str, first: tuple[str, float], second: tuple[str, float]) -> Claim:
        own, other = self._arms.get(first, {}), self._arms.get(second, {})
        seeds = sorted(own.keys() & other.keys())
        if not seeds:
            return Claim(text, source, Interval.unknown(), ())
        found = pooled_gain([own[seed] for seed in seeds], self._evidence, [other[seed] for seed in seeds])
        return Claim(text, source, found, tuple(own[seed].gain - other[seed].gain for seed in seeds))
