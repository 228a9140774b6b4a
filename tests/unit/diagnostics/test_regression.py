"""Standardised least squares with D^L and D^I, on data whose coefficients are known."""

import numpy as np
import pandas as pd
import pytest

from megatron_tip.diagnostics.statistics.bootstrap import PromptResamples
from megatron_tip.diagnostics.statistics.regression import BASELINE, DECOMPOSED, decompose, fit, residual_gain


def synthetic(beta_l: float, beta_i: float, *, num_prompts: int = 150, tokens: int = 20, seed: int = 0) -> pd.DataFrame:
    """Tokens whose gain is beta_l D^L + beta_i D^I + 0.2 H + a part of the prompt's own + noise."""
    generator = np.random.default_rng(seed)
    size = num_prompts * tokens
    prompts = np.repeat(np.arange(num_prompts), tokens)
    d, c, h = generator.uniform(size=(3, size))
    frame = pd.DataFrame({"prompt": prompts, "d": d, "c": c, "h": h, "d_l": d * c, "d_i": d * (1 - c)})
    frame["position"] = np.tile(np.arange(tokens), num_prompts)
    frame["teacher_entropy"] = generator.gamma(2.0, size=size)
    shared = 0.1 * generator.normal(size=num_prompts)[prompts]
    noise = 0.3 * generator.normal(size=size)
    frame["gain"] = beta_l * frame["d_l"] + beta_i * frame["d_i"] + 0.2 * frame["h"] + shared + noise
    return frame


def resamples_of(frame: pd.DataFrame, number: int = 300) -> PromptResamples:
    return PromptResamples.draw(frame["prompt"].to_numpy(), resamples=number, seed=1)


def test_a_planted_difference_is_found():
    frame = synthetic(0.6, 0.2)
    found = decompose(frame, resamples_of(frame))
    for name, beta in (("d_l", 0.6), ("d_i", 0.2)):
        expected = beta * frame[name].std(ddof=0)
        interval = found.decomposed.coefficients[name]
        assert interval.low < expected < interval.high
        assert interval.low > 0
    assert found.gap.low > 0
    assert found.delta_r_squared.low > 0


def test_without_a_difference_the_gap_covers_zero():
    covered = 0
    for seed in range(20):
        frame = synthetic(0.4, 0.4, seed=seed, num_prompts=80)
        scale = frame["d_l"].std(ddof=0) - frame["d_i"].std(ddof=0)
        gap = decompose(frame, resamples_of(frame)).gap
        covered += gap.low < 0.4 * scale < gap.high
    assert covered >= 16  # 19 of 20 expected


def test_no_effect_at_all_covers_zero():
    frame = synthetic(0.0, 0.0, seed=3)
    found = decompose(frame, resamples_of(frame))
    for interval in (found.decomposed.coefficients["d_l"], found.decomposed.coefficients["d_i"], found.gap):
        assert interval.low < 0 < interval.high
    assert found.delta_r_squared.estimate < 2e-3


def test_point_and_resampled_coefficients_are_those_of_numpy():
    frame = synthetic(0.6, 0.2, num_prompts=30).assign(h_d=lambda table: table["h"] * table["d"])
    resamples = resamples_of(frame, 40)
    gain = frame["gain"].to_numpy()
    regression, draws = fit(frame, DECOMPOSED, gain, resamples)
    raw = frame[list(DECOMPOSED)].to_numpy()
    design = np.column_stack([np.ones(len(gain)), (raw - raw.mean(axis=0)) / raw.std(axis=0)])
    expected = np.linalg.lstsq(design, gain, rcond=None)[0][1:]
    np.testing.assert_allclose([item.estimate for item in regression.coefficients.values()], expected, rtol=1e-8)
    for row in (0, 17):
        picked = np.concatenate(
            [
                np.flatnonzero(frame["prompt"] == prompt)
                for prompt in np.repeat(np.arange(30), resamples.weights[row].astype(int))
            ]
        )
        by_hand = np.linalg.lstsq(design[picked], gain[picked], rcond=None)[0]
        np.testing.assert_allclose(draws.coefficients[row], by_hand[1:], rtol=1e-6)
        residual = gain[picked] - design[picked] @ by_hand
        assert draws.r_squared[row] == pytest.approx(1 - residual.var() / gain[picked].var())


def test_bootstrap_and_cluster_robust_errors_agree():
    frame = synthetic(0.6, 0.2)
    found = decompose(frame, resamples_of(frame, 1000)).decomposed
    for name, error in found.errors.items():
        interval = found.coefficients[name]
        assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(error, rel=0.2), name


def test_a_predictor_without_spread_is_left_out():
    frame = synthetic(0.6, 0.2).assign(c=1.0, d_i=0.0, teacher_entropy=2.0)
    frame["d_l"] = frame["d"]
    found = decompose(frame, resamples_of(frame))
    assert found.decomposed.left_out == ("d_i", "teacher_entropy")
    assert np.isnan(found.gap.estimate)
    assert found.delta_r_squared.estimate == pytest.approx(0, abs=1e-12)


def test_the_baseline_lies_within_the_decomposition():
    frame = synthetic(0.1, 0.5, seed=9)
    found = decompose(frame, resamples_of(frame))
    assert set(found.baseline.coefficients) == set(BASELINE)
    assert found.decomposed.r_squared > found.baseline.r_squared


def test_the_residual_gain_knows_nothing_of_entropy_or_position():
    frame = synthetic(0.5, 0.1)
    left = residual_gain(frame)
    for name in ("h", "position", "teacher_entropy"):
        assert abs(np.corrcoef(left, frame[name])[0, 1]) < 1e-9


def test_of_collinear_predictors_the_later_one_is_left_out_and_named():
    """With one C for all tokens D^L and D^I are both multiples of D, as far as float32 goes; a gap means nothing."""
    frame = synthetic(0.6, 0.2)
    rounding = 1e-7 * np.random.default_rng(1).normal(size=len(frame))
    frame = frame.assign(d_l=0.3 * frame["d"], d_i=0.7 * frame["d"] + rounding)
    found = decompose(frame, resamples_of(frame))
    assert found.decomposed.left_out == ("d_i",)
    assert np.isnan(found.gap.estimate)
    assert found.delta_r_squared.estimate == pytest.approx(0, abs=1e-9)
    interval = found.decomposed.coefficients["d_l"]
    assert interval.estimate == pytest.approx(found.baseline.coefficients["d"].estimate, rel=1e-6)
    assert interval.low < interval.estimate < interval.high


def test_a_resample_that_does_not_tell_predictors_apart_does_not_count():
    """Two of eight prompts alone have D^I beside D^L: without them there is nothing to estimate it from."""
    frame = synthetic(0.6, 0.2, num_prompts=8)
    rare = frame["prompt"] < 2
    frame["d_i"] = np.where(rare, frame["d_i"], 0.0)
    resamples = resamples_of(frame)
    _, draws = fit(frame.assign(h_d=frame["h"] * frame["d"]), DECOMPOSED, frame["gain"].to_numpy(), resamples)
    lacking = (resamples.weights[:, :2] == 0).all(axis=1)
    assert 0 < lacking.sum() < len(lacking)
    np.testing.assert_array_equal(np.isnan(draws.coefficients[:, 0]), lacking)


def test_one_prompt_has_estimates_without_bounds():
    frame = synthetic(0.6, 0.2, num_prompts=1, tokens=60)
    found = decompose(frame, resamples_of(frame))
    assert np.isfinite([found.gap.estimate, found.delta_r_squared.estimate, found.decomposed.r_squared]).all()
    for interval in (found.gap, found.delta_r_squared, found.decomposed.coefficients["d_l"]):
        assert np.isnan([interval.low, interval.high]).all()
        assert not interval.excludes_zero
    assert np.isnan(list(found.decomposed.errors.values())).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_predictors_leave_predictors_out(tokens):
    frame = synthetic(0.6, 0.2, num_prompts=2, tokens=tokens)
    found = decompose(frame, resamples_of(frame))
    assert found.decomposed.left_out
    assert np.isfinite(found.decomposed.r_squared)


def test_a_constant_gain_has_no_r_squared():
    frame = synthetic(0.6, 0.2).assign(gain=0.25)
    found = decompose(frame, resamples_of(frame))
    assert np.isnan(found.decomposed.r_squared)
    assert found.decomposed.coefficients["d_l"].estimate == pytest.approx(0, abs=1e-12)
