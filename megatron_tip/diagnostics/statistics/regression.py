"""Regression of the gain on pre-update signals: standardised least squares, as in TA-OPD appendix F."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm

from megatron_tip.diagnostics.statistics.bootstrap import Interval, PromptResamples, interval_of

CONTROLS = ("h", "h_d", "position", "teacher_entropy")
BASELINE = ("d", *CONTROLS)
DECOMPOSED = ("d_l", "d_i", *CONTROLS)

_LEAST_SPREAD = 1e-4
"""Least spread of a standardised predictor beyond what those before it explain. The signals come from float32
statistics: if two mean the same, their difference is rounding, about 1e-7, and a coefficient on it would be noise
divided by noise.
"""
_LEAST_EIGENVALUE = 1e-10
"""Least eigenvalue of a resample's Gram matrix, relative to its largest: below it, the normal equations lose all but a
few digits in float64. What `_LEAST_SPREAD` leaves in is at 1e-8 or above over all tokens.
"""


@dataclass(frozen=True)
class Regression:
    """Ordinary least squares of the gain in nats on standardised predictors.

    `coefficients`: nats per standard deviation, with prompt-cluster bootstrap intervals. `errors`: their cluster-robust
    standard errors (statsmodels), a check on the bootstrap; NaN with one prompt, or with no more tokens than
    coefficients. `r_squared`: NaN if the gain has no spread. `left_out`: predictors that add nothing to those before
    them.
    """

    coefficients: dict[str, Interval]
    errors: dict[str, float]
    r_squared: float
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Decomposition:
    """The baseline (H, D, H·D, position, teacher entropy) and the model in which D^L and D^I take the place of D.

    D = D^L + D^I, so the second contains the first: `delta_r_squared` is not negative. `gap`: of the coefficients of
    D^L and D^I.
    """

    baseline: Regression
    decomposed: Regression
    gap: Interval
    delta_r_squared: Interval


def decompose(frame: pd.DataFrame, resamples: PromptResamples) -> Decomposition:
    """Runs both regressions on the columns of a `BankTokens`."""
    table = frame.assign(h_d=frame["h"] * frame["d"])
    gain = table["gain"].to_numpy()
    baseline, of_baseline = fit(table, BASELINE, gain, resamples)
    decomposed, of_decomposed = fit(table, DECOMPOSED, gain, resamples)
    gap = Interval.unknown()
    if not {"d_l", "d_i"} & set(decomposed.left_out):
        low, high = (decomposed.coefficients[name].estimate for name in ("d_i", "d_l"))
        names = [name for name in DECOMPOSED if name not in decomposed.left_out]
        draws = of_decomposed.coefficients[:, [names.index("d_l"), names.index("d_i")]]
        gap = interval_of(high - low, draws[:, 0] - draws[:, 1], len(gain))
    delta = decomposed.r_squared - baseline.r_squared
    return Decomposition(
        baseline, decomposed, gap, interval_of(delta, of_decomposed.r_squared - of_baseline.r_squared, len(gain))
    )


@dataclass(frozen=True)
class _Draws:
    """Resampled results. `coefficients`: `[resamples, predictors]`. `r_squared`: `[resamples]`."""

    coefficients: np.ndarray
    r_squared: np.ndarray


def fit(
    table: pd.DataFrame, names: tuple[str, ...], gain: np.ndarray, resamples: PromptResamples
) -> tuple[Regression, _Draws]:
    """Fits least squares by statsmodels, and on each resample of prompts by its normal equations.

    Predictors are standardised once, over all tokens, not in each resample. A predictor without spread, or with less
    than `_LEAST_SPREAD` beyond those before it, has no coefficient: it is left out and named.
    """
    used, design = _independent(table, names)
    clusters, tokens = resamples.num_prompts(), len(gain)
    model = sm.OLS(gain, design)
    if clusters > 1 and tokens > design.shape[1]:
        fitted = model.fit(cov_type="cluster", cov_kwds={"groups": resamples.place})
        errors = np.asarray(fitted.bse)
    else:
        fitted, errors = model.fit(), np.full(design.shape[1], np.nan)
    draws = _resampled(design, gain, resamples)
    coefficients = {
        name: interval_of(float(fitted.params[place]), draws.coefficients[:, place - 1], tokens)
        for place, name in enumerate(used, start=1)
    }
    r_squared = float(fitted.rsquared) if np.ptp(gain) > 0 else float("nan")
    named_errors = {name: float(errors[place]) for place, name in enumerate(used, start=1)}
    left_out = tuple(name for name in names if name not in used)
    return Regression(coefficients, named_errors, r_squared, left_out), draws


def _independent(table: pd.DataFrame, names: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """Returns the predictors that can have a coefficient, and `[tokens, 1 + used]`, ones and them, standardised."""
    used, design = [], np.ones((len(table), 1))
    for name in names:
        values = table[name].to_numpy(dtype=np.float64)
        spread = values.std()
        if spread <= 1e-12:
            continue
        column = (values - values.mean()) / spread
        beyond = column - design @ np.linalg.lstsq(design, column, rcond=None)[0]
        if beyond.std() > _LEAST_SPREAD:
            used.append(name)
            design = np.column_stack([design, column])
    return used, design


def _resampled(design: np.ndarray, gain: np.ndarray, resamples: PromptResamples) -> _Draws:
    """Returns each resample's coefficients and R²; NaN if its prompts are all one or cannot separate the predictors."""
    columns = np.column_stack([design, gain])
    size = columns.shape[1]
    products = (columns[:, :, None] * columns[:, None, :]).reshape(len(gain), -1)
    moments = resamples.sums(products).reshape(-1, size, size)
    gram, cross = moments[:, :-1, :-1], moments[:, :-1, -1]
    eigenvalues = np.linalg.eigvalsh(gram)
    known = (eigenvalues[:, 0] > _LEAST_EIGENVALUE * eigenvalues[:, -1]) & (resamples.num_prompts() > 1)
    coefficients = np.full(cross.shape, np.nan)
    coefficients[known] = np.linalg.solve(gram[known], cross[known][:, :, None])[:, :, 0]
    count, total, squares = moments[:, 0, 0], moments[:, 0, -1], moments[:, -1, -1]
    residual = squares - np.einsum("ri,ri->r", coefficients, cross)
    with np.errstate(invalid="ignore", divide="ignore"):
        r_squared = 1 - residual / (squares - total**2 / count)
    return _Draws(coefficients[:, 1:], r_squared)


def residual_gain(frame: pd.DataFrame) -> np.ndarray:
    """Returns the gain, `[tokens]`, minus its least-squares prediction from entropy, position and teacher entropy."""
    raw = frame[["h", "position", "teacher_entropy"]].to_numpy(dtype=np.float64)
    design = np.column_stack([np.ones(len(raw)), raw - raw.mean(axis=0)])
    gain = frame["gain"].to_numpy()
    return gain - design @ np.linalg.lstsq(design, gain, rcond=None)[0]
