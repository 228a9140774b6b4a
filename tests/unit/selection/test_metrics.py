import numpy as np
import pytest

from megatron_tip.selection import PAPERS_RULES, Selector
from tests.helpers.selection import make_batch

LENGTHS = [30, 50, 7, 13]


@pytest.fixture(scope="module")
def outcome():
    statistics, index = make_batch(3, LENGTHS)
    return (
        statistics,
        index,
        Selector(rule="ta_opd_teachability", retention_ratio=0.2).select(statistics, index, step=0),
    )


def test_counts_and_threshold(outcome):
    _, _, selection = outcome
    metrics = selection.metrics
    assert metrics["selection/num_valid"] == 100.0
    assert metrics["selection/num_selected"] == 20.0
    assert metrics["selection/retention_ratio"] == 0.2
    assert 0 < metrics["selection/threshold"] < 1
    assert metrics["selection/tied_share"] == 0.0


def test_means_of_kept_and_dropped_rows(outcome):
    statistics, _, selection = outcome
    mask = selection.selection_mask
    for name in ("student_entropy", "reverse_kl", "support_divergence", "compatibility"):
        values = getattr(statistics, name).double()
        assert selection.metrics[f"selection/kept_{name}_mean"] == pytest.approx(float(values[mask].mean()))
        assert selection.metrics[f"selection/dropped_{name}_mean"] == pytest.approx(float(values[~mask].mean()))


def test_quadrants_name_their_thresholds(outcome):
    statistics, _, selection = outcome
    metrics, mask = selection.metrics, selection.selection_mask.numpy()
    h, d = statistics.student_entropy.double().numpy(), statistics.support_divergence.double().numpy()
    assert metrics["selection/median_student_entropy"] == np.median(h)
    assert metrics["selection/median_support_divergence"] == np.median(d)
    q3 = (h <= np.median(h)) & (d > np.median(d))
    assert metrics["selection/q3_share"] == q3.mean()
    assert metrics["selection/kept_q3_share"] == q3[mask].mean()
    q2 = (h > np.median(h)) & (d <= np.median(d))
    assert metrics["selection/q2_share"] == q2.mean()
    assert sum(metrics[f"selection/q{k}_share"] for k in (1, 2, 3, 4)) == pytest.approx(1)
    assert sum(metrics[f"selection/kept_q{k}_share"] for k in (1, 2, 3, 4)) == pytest.approx(1)


def test_tip_rules_cut_the_quadrants_at_the_full_vocabulary_divergence():
    statistics, index = make_batch(3, LENGTHS)
    metrics = Selector(rule="tip_soft_or", retention_ratio=0.2).select(statistics, index, step=0).metrics
    assert metrics["selection/median_reverse_kl"] == np.median(statistics.reverse_kl.double().numpy())
    assert "selection/median_support_divergence" not in metrics


def test_positions(outcome):
    _, index, selection = outcome
    first_tenth = index.position < 5  # of the longest response, 50
    expected = float(selection.selection_mask[first_tenth].double().mean())
    assert selection.metrics["selection/retention_position_0"] == pytest.approx(expected)
    last_tenth = index.position >= 45
    expected = float(selection.selection_mask[last_tenth].double().mean())
    assert selection.metrics["selection/retention_position_9"] == pytest.approx(expected)


@pytest.mark.parametrize("scope", ["batch", "rollout"])
def test_agreement_with_every_other_rule(scope):
    statistics, index = make_batch(3, LENGTHS)
    active = Selector(rule="ta_opd_teachability", retention_ratio=0.2, scope=scope).select(statistics, index, step=0)
    names = {name.removeprefix("selection/jaccard_") for name in active.metrics if "jaccard_" in name}
    assert names == set(PAPERS_RULES) - {"full", "ta_opd_teachability"}
    for rule in sorted(names - {"random", "tip_entropy_sampling"}):
        selector = Selector(rule=rule, retention_ratio=0.2, scope=scope, compare=False)
        other = selector.select(statistics, index, step=0)
        both = active.selection_mask & other.selection_mask
        either = active.selection_mask | other.selection_mask
        expected = int(both.sum()) / int(either.sum())
        assert active.metrics[f"selection/jaccard_{rule}"] == pytest.approx(expected), rule


def test_comparison_can_be_turned_off_and_skips_what_the_statistics_do_not_allow():
    statistics, index = make_batch(4, LENGTHS)
    quiet = Selector(rule="tip_entropy", retention_ratio=0.2, compare=False).select(statistics, index, step=0)
    assert not [name for name in quiet.metrics if "jaccard" in name]
    statistics.compatibility[0] = float("inf")
    metrics = Selector(rule="tip_entropy", retention_ratio=0.2).select(statistics, index, step=0).metrics
    assert "selection/jaccard_ta_opd_divergence" in metrics
    assert "selection/jaccard_ta_opd_teachability" not in metrics
    assert "selection/kept_compatibility_mean" not in metrics
    _, index = make_batch(4, LENGTHS)
    bare = Selector(rule="random", retention_ratio=0.2).select(None, index, step=0).metrics
    assert bare["selection/num_selected"] == 20.0
    assert not [name for name in bare if "mean" in name or "share" in name.replace("tied_share", "")]


def test_everything_kept():
    statistics, index = make_batch(5, LENGTHS)
    metrics = Selector(rule="full").select(statistics, index, step=0).metrics
    assert metrics["selection/retention_ratio"] == 1.0
    assert metrics["selection/kept_q1_share"] == metrics["selection/q1_share"] > 0
    assert not [name for name in metrics if "dropped" in name or "jaccard" in name]
