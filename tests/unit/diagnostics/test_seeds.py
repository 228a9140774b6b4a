"""Intervals over seeds, against statsmodels."""

import numpy as np
import pytest
from statsmodels.stats.weightstats import DescrStatsW

from megatron_tip.diagnostics.statistics.seeds import seed_interval


@pytest.mark.parametrize("values", [(-0.455, -0.019, 0.118), (1.0, 1.1), tuple(np.linspace(0, 1, 9))])
def test_the_interval_is_students_t(values):
    found = seed_interval(values)
    assert (found.low, found.high) == pytest.approx(DescrStatsW(values).tconfint_mean())
    assert found.estimate == pytest.approx(np.mean(values))


def test_one_seed_has_no_interval():
    assert seed_interval([0.3]).estimate == 0.3
    assert not seed_interval([0.3]).excludes_zero
    assert np.isnan(seed_interval([]).estimate)
