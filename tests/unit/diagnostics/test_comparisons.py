"""Gaps within Q3 and curves by bucket, with effects that are planted, confounded, and absent."""

import numpy as np
import pytest

from megatron_tip.diagnostics.statistics.bootstrap import PromptResamples
from megatron_tip.diagnostics.statistics.comparisons import bucket_curve, split_high, support_gap
from megatron_tip.diagnostics.statistics.tokens import PROXIES, BankTokens, bank_tokens
from tests.helpers.diagnostics import make_bank, make_scores


@pytest.fixture
def scores(tmp_path):
    return make_scores(make_bank(tmp_path / "bank", num_contexts=150))


def table_with(scores, gain) -> tuple[BankTokens, PromptResamples]:
    return bank_tokens(scores, gain, 16), PromptResamples.draw(scores.prompt, resamples=300, seed=1)


def noise(scores, seed: int = 1) -> np.ndarray:
    return 0.2 * np.random.default_rng(seed).normal(size=len(scores))


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_planted_gap_is_found_by_its_own_proxy_and_by_no_other(scores, proxy):
    table, _ = table_with(scores, noise(scores))
    high, _ = split_high(table.column(proxy), table.quadrant("q3"))
    planted, resamples = table_with(scores, noise(scores) + 0.3 * high)
    for name in PROXIES:
        found = support_gap(planted, name, resamples)
        assert found.num_tokens == int(table.quadrant("q3").sum())
        if name == proxy:
            assert found.bootstrap.low > 0.2
            assert found.matched.low > 0.2
        elif {name, proxy} != {"jaccard", "overlap"}:
            assert abs(found.bootstrap.estimate) < 0.1


def test_matching_takes_away_what_another_signal_explains(tmp_path):
    """C and D go together here and the gain follows D alone: high C seems to gain, until D is matched."""
    scores = make_scores(make_bank(tmp_path / "bank", num_contexts=20, num_tokens=400))
    columns = dict(scores.columns)
    divergence = columns["support_divergence_k16"].astype(np.float64)
    columns["compatibility_k16"] = (divergence / 2 + noise(scores)).astype(np.float32)
    related = type(scores)(scores.context, scores.prompt, scores.position, columns, scores.about)
    table, resamples = table_with(related, 0.5 * divergence + 0.1 * noise(scores, 2))
    found = support_gap(table, "compatibility", resamples)
    assert found.bootstrap.low > 0.1
    assert abs(found.matched.estimate) < found.bootstrap.estimate / 4


def test_without_an_effect_the_gaps_cover_zero(scores):
    table, resamples = table_with(scores, noise(scores))
    found = support_gap(table, "compatibility", resamples)
    assert found.bootstrap.low < 0 < found.bootstrap.high
    assert found.matched.low < 0 < found.matched.high


def test_an_empty_quadrant_has_no_tokens_and_no_gap(scores):
    """Entropy and divergence rise together: nothing lies in Q3."""
    columns = {**scores.columns, "reverse_kl": scores.columns["student_entropy"]}
    together = type(scores)(scores.context, scores.prompt, scores.position, columns, scores.about)
    table, resamples = table_with(together, noise(scores))
    found = support_gap(table, "compatibility", resamples)
    assert found.num_tokens == 0
    assert np.isnan([found.bootstrap.estimate, found.matched.estimate]).all()


def test_one_value_everywhere_has_no_low_side(scores):
    columns = {**scores.columns, "compatibility_k16": np.ones(len(scores), dtype=np.float32)}
    constant = type(scores)(scores.context, scores.prompt, scores.position, columns, scores.about)
    table, resamples = table_with(constant, noise(scores))
    found = support_gap(table, "compatibility", resamples)
    assert found.num_tokens > 0
    assert np.isnan(found.bootstrap.estimate)


def test_quadrants_are_cut_at_the_medians(scores):
    table, _ = table_with(scores, noise(scores))
    entropy, kl = scores.columns["student_entropy"], scores.columns["reverse_kl"]
    expected = (entropy <= np.median(entropy)) & (kl > np.median(kl))
    np.testing.assert_array_equal(table.quadrant("q3"), expected)


def test_learnable_and_incompatible_disagreement_are_the_papers(scores):
    table, _ = table_with(scores, noise(scores))

    def norm(values: np.ndarray) -> np.ndarray:
        low, high = np.quantile(values.astype(np.float64), [0.05, 0.95])
        return ((values - low) / (high - low + 1e-8)).clip(0, 1)

    d, c = norm(scores.columns["support_divergence_k16"]), norm(scores.columns["compatibility_k16"])
    np.testing.assert_allclose(table.column("d_l"), d * c, atol=1e-6)
    np.testing.assert_allclose(table.column("d_i"), d * (1 - c), atol=1e-6)
    np.testing.assert_allclose(table.column("d_l") + table.column("d_i"), table.column("d"), atol=1e-9)


def test_buckets_hold_a_tenth_each_and_follow_the_signal(scores):
    table, resamples = table_with(scores, noise(scores) + scores.columns["student_entropy"])
    curve = bucket_curve(table.column("entropy"), table.column("gain"), resamples)
    assert curve["tokens"].tolist() == [300] * 10
    np.testing.assert_allclose(curve["gain"], curve["value"], atol=0.05)
    assert (curve["low"] < curve["gain"]).all()
    assert (curve["gain"] < curve["high"]).all()


def test_ties_leave_fewer_buckets_but_lose_no_token(scores):
    values = np.repeat([0.0, 1.0], [2000, 1000])
    resamples = PromptResamples.draw(scores.prompt, resamples=20, seed=1)
    curve = bucket_curve(values, noise(scores), resamples)
    assert curve["tokens"].sum() == 3000
    assert curve["bucket"].tolist() == [7, 10]
    assert len(bucket_curve(np.ones(3000), noise(scores), resamples)) == 1
