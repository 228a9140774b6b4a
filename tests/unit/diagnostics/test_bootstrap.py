"""The bootstrap over prompts, against a plain resampling of tokens, with an effect and without one."""

import numpy as np
import pytest

from megatron_tip.diagnostics.statistics.bootstrap import Interval, PromptResamples


def clustered(num_prompts: int, tokens: int, *, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts, and values with a part that all tokens of a prompt share."""
    generator = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(num_prompts), tokens)
    return prompts, spread * generator.normal(size=num_prompts)[prompts] + generator.normal(size=len(prompts))


def test_the_mean_is_that_of_tokens_gathered_one_by_one():
    prompts, values = clustered(7, 5, seed=1)
    resamples = PromptResamples.draw(prompts, resamples=50, seed=3)
    found = resamples.mean(values)
    by_hand = [
        np.concatenate([values[prompts == prompt] for prompt in np.repeat(np.arange(7), row.astype(int))]).mean()
        for row in resamples.weights
    ]
    assert resamples.weights.sum(axis=1).tolist() == [7.0] * 50
    assert found.estimate == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))


def test_tokens_of_a_prompt_count_together():
    prompts, values = clustered(200, 30, seed=2)
    by_prompt = PromptResamples.draw(prompts, seed=1).mean(values)
    by_token = PromptResamples.draw(np.arange(len(values)), seed=1).mean(values)
    expected = 2 * 1.96 * np.sqrt((1 + 1 / 30) / 200)
    assert by_prompt.high - by_prompt.low == pytest.approx(expected, rel=0.25)
    assert by_prompt.high - by_prompt.low > 3 * (by_token.high - by_token.low)


def test_intervals_cover_a_true_mean_of_zero_as_often_as_they_say():
    covered = 0
    for seed in range(200):
        prompts, values = clustered(60, 5, seed=seed)
        covered += not PromptResamples.draw(prompts, resamples=300, seed=seed).mean(values).excludes_zero
    assert 178 <= covered <= 199  # 95 % of 200, within three standard deviations of the count


def test_a_planted_gap_is_found_and_a_missing_one_is_not():
    prompts, values = clustered(200, 20, seed=4)
    high = np.random.default_rng(5).uniform(size=len(values)) < 0.3
    resamples = PromptResamples.draw(prompts, seed=1)
    none = resamples.gap(values, high, ~high)
    planted = resamples.gap(values + 0.3 * high, high, ~high)
    assert none.low < 0 < none.high
    assert planted.low > 0
    assert planted.low < 0.3 < planted.high


def test_it_is_deterministic_by_seed():
    prompts, values = clustered(30, 5, seed=6)
    first, again, other = (PromptResamples.draw(prompts, seed=seed).mean(values) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_nothing_to_estimate_is_unknown():
    prompts, values = clustered(5, 4, seed=7)
    resamples = PromptResamples.draw(prompts, seed=1)
    nothing = np.zeros(len(values), dtype=bool)
    for found in (resamples.mean(values, nothing), resamples.gap(values, nothing, ~nothing), Interval.unknown()):
        assert np.isnan([found.estimate, found.low, found.high]).all()
        assert found.num_tokens == 0
        assert not found.excludes_zero


def test_tokens_of_one_prompt_have_no_bounds():
    """Resampled into itself it would never vary, and the smallest difference would pass for certain."""
    prompts, values = clustered(6, 4, seed=8)
    resamples = PromptResamples.draw(prompts, seed=1)
    first = prompts == 0
    for found in (resamples.mean(values, first), resamples.gap(values, first, ~first)):
        assert np.isfinite(found.estimate)
        assert np.isnan([found.low, found.high]).all()
        assert found.num_tokens > 0
    assert np.isfinite(resamples.mean(values, prompts < 2).low)
