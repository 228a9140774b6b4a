"""TA-OPD's tables about live interventions: selectors (2), Q3 masks (7), budget sweep (10), support sizes."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from megatron_tip.diagnostics.arms import ArmResult
from megatron_tip.diagnostics.papers.evidence import Evidence
from megatron_tip.diagnostics.papers.frames import rows
from megatron_tip.diagnostics.papers.token_tables import bounds
from megatron_tip.diagnostics.statistics.bootstrap import (
    Interval,
    PromptResamples,
    interval_of,
    without_spread,
)

MEANS = {
    "q3_share": "selection/kept_q3_share",
    "kept_entropy": "selection/kept_student_entropy_mean",
    "kept_divergence": "selection/kept_support_divergence_mean",
    "kept_compatibility": "selection/kept_compatibility_mean",
}
"""Column of a table -> metric of an arm; not available if the arm lacks it."""


def interventions(evidence: Evidence) -> pd.DataFrame:
    """Returns tables 2, 7 and 10 in one: the gain on held-out contexts by rule, budget and K.

    `gain`: mean over seeds of a held-out token's gain, with the prompt-cluster bootstrap interval over the held-out
    prompts of all seeds. `seed_sd`: standard deviation over seeds. `gain_per_keep`: per kept share. `over_random`: the
    gain above that of random tokens at the same budget and on the same contexts, with its interval.
    """
    by_key: dict[tuple[str, float, int], list[ArmResult]] = {}
    for result in evidence.arms:
        arm = result.arm
        by_key.setdefault((arm.rule, arm.retention_ratio, arm.support_size), []).append(result)
    random = {
        (key[1], result.arm.seed): result for key, found in by_key.items() if key[0] == "random" for result in found
    }
    found_rows = []
    for (rule, ratio, size), found in by_key.items():
        gain = pooled_gain(found, evidence)
        kept = sum(result.num_selected for result in found) / sum(result.num_valid for result in found)
        per_seed = [result.gain for result in found]
        others = [random.get((ratio, result.arm.seed)) for result in found]
        over = pooled_gain(found, evidence, others) if rule != "random" and all(others) else Interval.unknown()
        row = {"rule": rule, "ratio": ratio, "k": size, "seeds": len(found), "kept_share": kept, **bounds(gain)}
        row |= {
            "seed_sd": float(np.std(per_seed, ddof=1)) if len(found) > 1 else None,
            "gain_per_keep": gain.estimate / kept if kept else None,
        }
        row |= {"over_random": over.estimate, "over_low": over.low, "over_high": over.high}
        row |= {
            name: float(np.mean([result.metrics.get(metric, np.nan) for result in found]))
            for name, metric in MEANS.items()
        }
        found_rows.append(row)
    return pd.DataFrame(found_rows)


def pooled_gain(results: Sequence[ArmResult], evidence: Evidence, minus: Sequence[ArmResult | None] = ()) -> Interval:
    """Returns a held-out token's mean gain over an arm's seeds, or its difference from that of the arms `minus`."""
    others: Sequence[ArmResult | None] = minus or [None] * len(results)
    sums, counts, contexts = [], [], []
    for result, other in zip(results, others, strict=True):
        reference = other.after if other is not None else result.before
        sums += [before - after for before, after in zip(reference, result.after, strict=True)]
        counts += result.num_tokens
        contexts += result.contexts
    prompts = evidence.bank.prompts[contexts]
    resamples = PromptResamples.draw(prompts, resamples=evidence.resamples, seed=evidence.seed)
    if resamples.num_prompts() < 2:
        return without_spread(float(np.sum(sums) / np.sum(counts)), int(np.sum(counts)))
    drawn = resamples.sums(np.column_stack([sums, counts]).astype(np.float64))
    return interval_of(float(np.sum(sums) / np.sum(counts)), drawn[:, 0] / drawn[:, 1], int(np.sum(counts)))


def by_support_size(table: pd.DataFrame, ratio: float) -> pd.DataFrame:
    """Returns the rows, at one budget, of the rules tried at more than one K."""
    own = rows(table, ratio=ratio)
    counts = Counter(own["rule"])
    return rows(own, rule=[name for name, count in counts.items() if count > 1])
