"""TA-OPD's tables about tokens: quadrants, support gaps (1, 6), regressions (9), exact top-N (8), buckets."""

import pandas as pd

from megatron_tip.diagnostics.gain import Gain
from megatron_tip.diagnostics.papers.evidence import Evidence
from megatron_tip.diagnostics.statistics.bootstrap import Interval, PromptResamples
from megatron_tip.diagnostics.statistics.comparisons import bucket_curve, support_gap
from megatron_tip.diagnostics.statistics.regression import residual_gain
from megatron_tip.diagnostics.statistics.tokens import PROXIES, bank_tokens, mean_gain, selected_rows
from megatron_tip.selection import PAPERS_RULES, compare_rules

CURVES = ("d_l", "d_i", "c", "d", "h")


def bounds(found: Interval, name: str = "gain") -> dict[str, float]:
    """Returns an interval as columns."""
    return {name: found.estimate, "low": found.low, "high": found.high}


def quadrants(evidence: Evidence) -> pd.DataFrame:
    """Returns, by quadrant, tokens and their share, the gain, means of D^L, D^I and C; n = 0 if it is empty."""
    table, (_, resamples) = evidence.table(evidence.main_support_size), evidence.untrained
    rows = []
    for name in ("q1", "q2", "q3", "q4"):
        own = table.quadrant(name)
        means = {
            column: table.column(column)[own].mean() if own.any() else None
            for column in ("d_l", "d_i", "compatibility")
        }
        found = resamples.mean(table.column("gain"), own)
        rows.append({"quadrant": name, "tokens": int(own.sum()), "share": own.mean(), **bounds(found), **means})
    return pd.DataFrame(rows)


def robustness(evidence: Evidence) -> pd.DataFrame:
    """Returns table 1: the gap between high and low C within Q3, by checkpoint and K."""
    return pd.DataFrame(
        [
            {"checkpoint": name, "k": size, **_gap(gain, "compatibility", size, evidence)}
            for name, gain in evidence.gains.items()
            for size in evidence.support_sizes
        ]
    )


def _gap(gain: Gain, proxy: str, support_size: int, evidence: Evidence) -> dict[str, float]:
    resamples = PromptResamples.draw(gain.before.prompt, resamples=evidence.resamples, seed=evidence.seed)
    found = support_gap(bank_tokens(gain.before, gain.tokens, support_size), proxy, resamples)
    return {"q3_tokens": found.num_tokens, **bounds(found.bootstrap, "gap"), "matched_gap": found.matched.estimate}


def proxies(evidence: Evidence) -> pd.DataFrame:
    """Returns table 6: the same gap by every support proxy and K."""
    rows = []
    for size in evidence.support_sizes:
        for proxy in PROXIES:
            found = evidence.support_gap(size, proxy)
            matched = {
                "matched_gap": found.matched.estimate,
                "matched_low": found.matched.low,
                "matched_high": found.matched.high,
            }
            rows.append(
                {"k": size, "proxy": proxy, "q3_tokens": found.num_tokens, **bounds(found.bootstrap, "gap"), **matched}
            )
    return pd.DataFrame(rows)


def regressions(evidence: Evidence) -> pd.DataFrame:
    """Returns table 9: coefficients of D^L and D^I, their gap, and what the decomposition adds to R²."""
    rows = []
    for size in evidence.support_sizes:
        found = evidence.decomposition(size)
        row: dict[str, object] = {"k": size, "tokens": len(evidence.table(size).frame)}
        for name in ("d_l", "d_i"):
            interval = found.decomposed.coefficients.get(name, Interval.unknown())
            row |= {f"beta_{name}": interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
            row[f"{name}_robust_error"] = found.decomposed.errors.get(name)
        row |= {"beta_gap": found.gap.estimate, "gap_low": found.gap.low, "gap_high": found.gap.high}
        delta = found.delta_r_squared
        row |= {
            "r_squared": found.decomposed.r_squared,
            "delta_r_squared": delta.estimate,
            "delta_low": delta.low,
            "delta_high": delta.high,
        }
        row["left_out"] = " ".join(found.decomposed.left_out)
        rows.append(row)
    return pd.DataFrame(rows)


def coefficients(evidence: Evidence) -> pd.DataFrame:
    """Returns all coefficients of both regressions, with intervals."""
    rows = []
    for size in evidence.support_sizes:
        found = evidence.decomposition(size)
        for model, regression in (("baseline", found.baseline), ("decomposed", found.decomposed)):
            rows += [
                {"k": size, "model": model, "predictor": name, **bounds(interval, "beta")}
                for name, interval in regression.coefficients.items()
            ]
    return pd.DataFrame(rows)


def top_n(evidence: Evidence) -> pd.DataFrame:
    """Returns table 8: the mean gain of each rule's highest-ranked tokens, under the common update of all tokens."""
    size = evidence.main_support_size
    table, (scores, resamples) = evidence.table(size), evidence.untrained
    rows = []
    for ratio in evidence.main_ratios:
        for name in PAPERS_RULES:
            if name == "full":
                continue
            kept = selected_rows(scores, size, name, ratio, seed=evidence.seed)
            found = resamples.mean(table.column("gain"), kept)
            means = {column: table.column(column)[kept].mean() for column in ("h", "d", "c")}
            share = table.quadrant("q3")[kept].mean()
            row = {"rule": name, "ratio": ratio, "kept": int(kept.sum()), **bounds(found)}
            rows.append(row | {"gain_per_keep": found.estimate / ratio, "q3_share": share, **means})
    return pd.DataFrame(rows)


def buckets(evidence: Evidence) -> pd.DataFrame:
    """Returns the gain by tenth of D^L, D^I, C, D and H, as it is and without H, position and teacher entropy."""
    table, (_, resamples) = evidence.table(evidence.main_support_size), evidence.untrained
    outcomes = {"gain": table.column("gain"), "residual": residual_gain(table.frame)}
    parts = [
        bucket_curve(table.column(name), values, resamples).assign(by=name, outcome=outcome)
        for name in CURVES
        for outcome, values in outcomes.items()
    ]
    return pd.concat(parts, ignore_index=True)


def overlaps(evidence: Evidence) -> pd.DataFrame:
    """Returns the Jaccard overlap of the tokens that the rules keep of the whole bank at the main budget."""
    statistics = evidence.start.statistics(evidence.main_support_size)
    index, ratio = evidence.start.token_index(), evidence.main_ratio
    found = compare_rules(statistics, index, retention_ratio=ratio, seed=evidence.seed)
    return pd.DataFrame(found.jaccard.numpy(), index=list(found.names), columns=list(found.names))


def gains(evidence: Evidence) -> pd.DataFrame:
    """Returns each checkpoint's gain over the start, absolute and relative, and their mean on common tokens."""
    rows = []
    for name, gain in evidence.gains.items():
        rows.append({"checkpoint": name, **gain_row(gain, resamples=evidence.resamples, seed=evidence.seed)})
    scores, values = mean_gain(list(evidence.gains.values()))
    found = evidence.untrained[1].mean(values)
    before = float(scores.columns["forward_kl"].mean())
    rows.append(
        {
            "checkpoint": "mean",
            "tokens": len(scores),
            "kl_before": before,
            **bounds(found),
            "relative": found.estimate / before if before else None,
        }
    )
    return pd.DataFrame(rows)


def gain_row(gain: Gain, *, resamples: int, seed: int) -> dict[str, float]:
    """Returns tokens, KL before, gain with its interval, relative gain."""
    found = PromptResamples.draw(gain.before.prompt, resamples=resamples, seed=seed).mean(gain.tokens)
    before = float(gain.before.columns["forward_kl"].mean())
    return {"tokens": len(gain.before), "kl_before": before, **bounds(found), "relative": gain.relative}
