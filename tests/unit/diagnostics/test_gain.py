"""G between two checkpoints: only of one bank, teacher and temperature, and not on what was trained on."""

import numpy as np
import pytest

from megatron_tip.diagnostics.gain import gain_between
from megatron_tip.diagnostics.statistics.tokens import mean_gain
from megatron_tip.errors import InputError
from tests.helpers.diagnostics import make_bank, make_scores, with_gain


@pytest.fixture
def start(tmp_path):
    return make_scores(make_bank(tmp_path / "bank"))


def test_gain_is_the_difference_of_kl_and_its_share_of_it(start):
    found = gain_between(start, with_gain(start, np.full(len(start), 0.25)))
    np.testing.assert_allclose(found.tokens, 0.25, atol=1e-6)
    assert found.mean == pytest.approx(0.25, abs=1e-6)
    assert found.relative == pytest.approx(0.25 / start.columns["forward_kl"].astype(np.float64).mean(), rel=1e-5)


def test_contexts_that_were_trained_on_do_not_count(start):
    gain = np.where(start.context < 10, 100.0, 0.1)
    found = gain_between(start, with_gain(start, gain, trained_contexts=list(range(10))))
    assert len(found.tokens) == 50 * 20
    assert found.mean == pytest.approx(0.1, abs=1e-4)
    with pytest.raises(InputError, match="neither checkpoint was trained on"):
        gain_between(start, with_gain(start, gain, trained_contexts=list(range(60))))


@pytest.mark.parametrize("key, value", [("bank", "other"), ("teacher", "other"), ("temperature", 0.7)])
def test_scores_that_do_not_belong_together_are_refused(start, key, value):
    with pytest.raises(InputError, match=f"scores of one {key}"):
        gain_between(start, with_gain(start, np.zeros(len(start)), **{key: value}))


def test_the_mean_over_checkpoints_is_over_tokens_that_none_was_trained_on(start):
    gains = [
        gain_between(start, with_gain(start, np.full(len(start), value), trained_contexts=trained))
        for value, trained in ((0.1, [0, 1]), (0.3, [1, 2]))
    ]
    scores, values = mean_gain(gains)
    assert sorted(set(scores.context)) == list(range(3, 60))
    np.testing.assert_allclose(values, 0.2, atol=1e-6)
    with pytest.raises(InputError, match="at least one checkpoint"):
        mean_gain([])
