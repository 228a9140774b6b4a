import pytest
import torch

from megatron_tip.selection import PAPERS_RULES, Selector, compare_rules
from tests.helpers.selection import make_batch


@pytest.mark.parametrize("scope", ["batch", "rollout"])
def test_overlaps_and_quadrants_are_those_of_the_masks(scope):
    statistics, index = make_batch(1, [40, 60])
    comparison = compare_rules(
        statistics, index, retention_ratio=0.1, scope=scope, divergence="support_divergence", seed=3
    )
    assert set(comparison.names) == set(PAPERS_RULES) - {"full"}
    assert comparison.num_selected.tolist() == [10] * len(comparison.names)
    high_h = statistics.student_entropy > statistics.student_entropy.quantile(0.5)
    high_d = statistics.support_divergence > statistics.support_divergence.quantile(0.5)
    cuts = [high_h & high_d, high_h & ~high_d, ~high_h & high_d, ~high_h & ~high_d]
    assert comparison.axes == ("student_entropy", "support_divergence")
    for row, name in enumerate(comparison.names):
        selector = Selector(rule=name, retention_ratio=0.1, scope=scope, seed=3 + row)
        mask = selector.select(statistics, index, step=0).selection_mask
        assert torch.equal(comparison.masks[row], mask), name
        assert comparison.quadrants[row].tolist() == pytest.approx([int((mask & cut).sum()) / 10 for cut in cuts])
        for column, other in enumerate(comparison.masks):
            expected = int((mask & other).sum()) / int((mask | other).sum())
            assert float(comparison.jaccard[row, column]) == pytest.approx(expected)


def test_rules_that_the_statistics_do_not_allow_are_left_out():
    statistics, index = make_batch(2, [30])
    statistics.student_entropy[0] = float("nan")
    comparison = compare_rules(statistics, index, retention_ratio=0.1)
    assert "ta_opd_teachability" in comparison.names
    assert "tip_soft_or" not in comparison.names
    assert (comparison.axes, comparison.quadrants.shape) == ((), (len(comparison.names), 0))


def test_rules_that_sample_draw_apart():
    statistics, index = make_batch(3, [400])
    statistics.student_entropy.fill_(1.0)  # both sample uniformly then
    comparison = compare_rules(statistics, index, retention_ratio=0.1)
    both = [comparison.names.index(name) for name in ("random", "tip_entropy_sampling")]
    assert float(comparison.jaccard[both[0], both[1]]) < 0.2
