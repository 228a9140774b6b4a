"""Tests over seeds, against statsmodels."""

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from megatron_tip.diagnostics.statistics.seeds import holm, seed_p_value


@pytest.mark.parametrize("values", [(-0.455, -0.019, 0.118), (1.0, 1.1), tuple(np.linspace(0, 1, 9))])
def test_the_p_value_is_students_t(values):
    assert seed_p_value(values) == pytest.approx(DescrStatsW(values).ttest_mean()[1])


def test_seeds_without_spread_are_certain_and_one_seed_knows_nothing():
    assert seed_p_value([0.3] * 5) == 0.0
    assert seed_p_value([0.0] * 5) == 1.0
    assert np.isnan(seed_p_value([0.3]))
    assert np.isnan(seed_p_value([]))


def test_many_comparisons_are_corrected_by_holms_method():
    values = [0.04, 0.001, 0.2, 0.03, 0.001, 0.9]
    assert holm(values) == pytest.approx(multipletests(values, method="holm")[1])
    with_unknown = holm([values[0], float("nan"), *values[1:]])
    assert np.isnan(with_unknown[1])
    assert [with_unknown[0], *with_unknown[2:]] == pytest.approx(holm(values))
    assert holm([]) == []
