import json
from dataclasses import asdict

import pytest
import torch

from megatron_tip.errors import InputError, TrainingError
from megatron_tip.selection import Calibration, Selector, agreement, batch_totals, select_micro_batch
from tests.helpers.selection import make_batch, reference_mask, take_rows

LENGTHS = [40, 25, 60, 3]


def micro_batches(index) -> list[torch.Tensor]:
    return [(index.rollout_index // 2 == k).nonzero().flatten() for k in range(2)]


@pytest.mark.parametrize("rule", ["ta_opd_teachability", "tip_soft_or"])
def test_micro_batch_scope_keeps_the_best_of_each_micro_batch(rule):
    statistics, index = make_batch(1, LENGTHS)
    parts = micro_batches(index)
    selector = Selector(rule=rule, retention_ratio=0.1, scope="micro_batch")
    totals = batch_totals(selector, torch.tensor([len(rows) for rows in parts]))
    assert (totals.num_valid, totals.num_selected) == (128, 7 + 7)
    total_weight = 0.0
    for rows in parts:
        part = take_rows(statistics, index, rows)
        selection = select_micro_batch(selector, *part, step=0, totals=totals)
        expected = reference_mask(rule, *part, "0.1", "batch")
        assert selection.selection_mask.tolist() == expected.tolist()
        assert (selection.num_valid, selection.num_selected) == (128, 14)
        total_weight += float(selection.row_weights.sum())
    assert total_weight == pytest.approx(1.0)


@pytest.mark.parametrize("rule", ["ta_opd_teachability", "tip_entropy_sampling", "tip_divergence_bottom"])
def test_a_batch_under_its_own_calibration_is_selected_exactly(rule):
    statistics, index = make_batch(2, LENGTHS)
    selector = Selector(rule=rule, retention_ratio=0.1, scope="batch")
    exact, calibration = selector.select_and_calibrate(statistics, index, step=3)
    totals = batch_totals(selector, torch.tensor([len(rows) for rows in micro_batches(index)]))
    assert (totals.num_valid, totals.num_selected) == (128, 13)
    restored = Calibration(**json.loads(json.dumps(asdict(calibration))))
    for rows in micro_batches(index):
        part = select_micro_batch(
            selector, *take_rows(statistics, index, rows), step=3, totals=totals, calibration=restored
        )
        assert torch.equal(part.selection_mask, exact.selection_mask[rows])
        torch.testing.assert_close(part.row_weights, exact.row_weights[rows], rtol=0, atol=0)


@pytest.mark.parametrize("levels", [None, 4])
def test_an_earlier_calibration_meets_the_budget_on_average(levels):
    selector = Selector(rule="ta_opd_teachability", retention_ratio=0.1)
    _, calibration = selector.select_and_calibrate(*make_batch(3, [4000], levels=levels), step=0)
    statistics, index = make_batch(4, [4000], levels=levels)
    totals = batch_totals(selector, torch.tensor([4000]))
    stale = select_micro_batch(selector, statistics, index, step=1, totals=totals, calibration=calibration)
    exact = selector.select(statistics, index, step=1)
    kept = int(stale.selection_mask.sum())
    assert kept != 400
    assert abs(kept - 400) < 80  # 4 standard deviations of two batches' counts
    overlap = agreement(stale.selection_mask, exact.selection_mask)
    both = stale.selection_mask & exact.selection_mask
    assert overlap == int(both.sum()) / (kept + 400 - int(both.sum()))
    assert overlap > (0.8 if levels is None else 0.5)  # ties are broken by other rows


def test_importance_in_one_pass_is_unbiased():
    selector = Selector(rule="tip_entropy_sampling", retention_ratio=0.2, scope="batch", loss_scale="importance")
    statistics, index = make_batch(5, [8000])
    statistics.student_entropy.add_(1.0)
    _, calibration = selector.select_and_calibrate(statistics, index, step=0)
    totals = batch_totals(selector, torch.tensor([8000]))
    part = select_micro_batch(selector, statistics, index, step=1, totals=totals, calibration=calibration)
    assert float(part.row_weights.sum()) == pytest.approx(1.0, abs=0.1)
    micro = Selector(rule="tip_entropy_sampling", retention_ratio=0.2, scope="micro_batch", loss_scale="importance")
    part = select_micro_batch(micro, statistics, index, step=1, totals=batch_totals(micro, torch.tensor([8000])))
    assert float(part.row_weights.sum()) == pytest.approx(1.0, abs=0.1)


def test_empty_micro_batches_and_a_ratio_of_one():
    statistics, index = make_batch(6, [5])
    selector = Selector(rule="ta_opd_teachability", retention_ratio=0.5, scope="micro_batch")
    totals = batch_totals(selector, torch.tensor([0, 5]))
    empty = select_micro_batch(selector, *take_rows(statistics, index, torch.arange(0)), step=0, totals=totals)
    assert (len(empty.selection_mask), len(empty.row_weights), empty.num_selected) == (0, 0, 3)
    everything = Selector(rule="ta_opd_teachability", scope="micro_batch")
    part = select_micro_batch(everything, None, index, step=0, totals=batch_totals(everything, torch.tensor([5])))
    torch.testing.assert_close(part.row_weights, torch.full((5,), 0.2))
    assert bool(everything.select(None, index, step=0).selection_mask.all())


def test_refusals():
    statistics, index = make_batch(7, [5])
    per_micro_batch = Selector(rule="ta_opd_teachability", retention_ratio=0.5, scope="micro_batch")
    whole = Selector(rule="ta_opd_teachability", retention_ratio=0.5, scope="batch")
    totals = batch_totals(whole, torch.tensor([5]))
    with pytest.raises(TrainingError, match="no valid token"):
        batch_totals(per_micro_batch, torch.tensor([0, 0]))
    with pytest.raises(InputError, match="select_micro_batch"):
        per_micro_batch.select(statistics, index, step=0)
    with pytest.raises(InputError, match="needs the whole batch"):
        select_micro_batch(whole, statistics, index, step=0, totals=totals)
    with pytest.raises(InputError, match="compatibility"):
        select_micro_batch(per_micro_batch, None, index, step=0, totals=totals)
    nan = Selector(rule="tests.unit.selection.test_selector:nan_score", retention_ratio=0.5, scope="micro_batch")
    statistics.support_jaccard[0] = 0.0
    with pytest.raises(TrainingError, match=r"nan_score.*1 scores are NaN although \['support_jaccard'\]"):
        select_micro_batch(nan, statistics, index, step=0, totals=totals)
    statistics.compatibility[2] = float("nan")
    with pytest.raises(TrainingError, match="compatibility"):
        select_micro_batch(per_micro_batch, statistics, index, step=0, totals=totals)


def test_agreement_of_masks():
    mask = torch.tensor([True, True, False, False])
    assert agreement(mask, torch.tensor([True, False, True, False])) == pytest.approx(1 / 3)
    assert agreement(~mask & mask, ~mask & mask) == 1.0
