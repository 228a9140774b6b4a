import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_tip.records import TokenIndex
from megatron_tip.selection.budget import BatchBudget, RolloutBudget, TieOrder, batch_budget, rollout_budget
from megatron_tip.selection.replicas import Replicas
from tests.unit.selection.test_order_statistics import PROPERTY, VALUES, float32
from tools.simulated_replicas import SimulatedReplica, run_simulated


@pytest.mark.parametrize("ratio", ["0.05", "0.07", "0.1", "0.29", "0.3", "0.57", "0.001", "1e-05", "1.0"])
def test_budgets_are_those_of_the_decimal_ratio(ratio):
    for num_rows in (0, 1, 7, 19, 20, 21, 100, 1000, 12345, 10**8):
        exact = Fraction(ratio) * num_rows
        assert batch_budget(float(ratio), num_rows) == math.ceil(exact)
        assert rollout_budget(float(ratio), num_rows, 0) == math.floor(exact)


def test_short_rollouts_keep_the_minimum():
    assert [rollout_budget(0.05, num_rows, 1) for num_rows in (0, 1, 19, 20, 39, 40)] == [0, 1, 1, 1, 1, 2]
    assert [rollout_budget(0.05, num_rows, 3) for num_rows in (0, 2, 3, 59, 80)] == [0, 2, 3, 3, 4]


@PROPERTY
@given(st.lists(st.lists(VALUES, max_size=10), min_size=1, max_size=4).filter(any), st.data())
@example([[], [1.0, 1.0, 1.0], [1.0]], None)
@example([[0.0, -0.0], [-0.0, 0.0]], None)
def test_top_of_batch_equals_a_sort_with_ties_in_order(shards, data):
    num_rows = sum(len(shard) for shard in shards)
    num_kept = data.draw(st.integers(1, num_rows)) if data else 2
    order = np.random.default_rng(num_rows).permutation(num_rows)
    scores = float32([value for shard in shards for value in shard])
    expected = np.zeros(num_rows, dtype=bool)
    ranked = np.lexsort((order, -scores.numpy()))
    expected[ranked[:num_kept]] = True
    ends = np.cumsum([len(shard) for shard in shards])

    def work(replica: SimulatedReplica) -> tuple:
        rows = slice(ends[replica.rank] - len(shards[replica.rank]), ends[replica.rank])
        ties = TieOrder(torch.from_numpy(order[rows]), key_bits=max(1, (num_rows - 1).bit_length()))
        (kept,) = BatchBudget(num_kept, num_rows, replica).keep([scores[rows]], ties, with_runner_up=True)
        return kept.mask.numpy(), kept.threshold, kept.runner_up

    masks, thresholds, runners_up = zip(*run_simulated(work, len(shards)), strict=True)
    np.testing.assert_array_equal(np.concatenate(masks), expected)
    assert len(set(thresholds)) == 1
    at_threshold = scores.numpy() == thresholds[0].score
    assert thresholds[0].score == scores[expected].min()
    assert (thresholds[0].num_tied, thresholds[0].num_equal) == ((at_threshold & expected).sum(), at_threshold.sum())
    assert set(runners_up) == {float(scores[~expected].max()) if num_kept < num_rows else 0.0}


def test_vectors_share_the_collectives():
    scores = [torch.rand(1000, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    ties = TieOrder(torch.arange(1000), key_bits=10)

    def work(replica: SimulatedReplica) -> list[int]:
        BatchBudget(50, 1000, replica).keep(scores, ties, with_runner_up=False)
        return replica.sent_bytes

    assert len(run_simulated(work, 1)[0]) == 3


def test_top_of_each_rollout_and_its_runner_up():
    index = TokenIndex(torch.tensor([4, 2, 4, 2, 4, 7]), torch.tensor([0, 1, 2, 0, 1, 0]))
    scores = float32([0.5, 0.1, 0.5, 0.9, 0.5, -3.0])
    budget = RolloutBudget.of(index, 0.5, minimum=1)
    ties = TieOrder(index.rollout_index * 3 + index.position, key_bits=5)
    (kept,) = budget.keep([scores], ties, with_runner_up=True)
    assert budget.num_selected == 3
    assert kept.mask.tolist() == [True, False, False, True, False, True]
    torch.testing.assert_close(kept.runner_up, float32([0.5, 0.1, 0.5, 0.1, 0.5, 0.0]))
    torch.testing.assert_close(budget.uniform_inclusion(), float32([1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3, 1.0]))


def test_a_replica_without_rollouts():
    empty = torch.empty(0, dtype=torch.int64)
    budget = RolloutBudget.of(TokenIndex(empty, empty), 0.5, minimum=1)
    (kept,) = budget.keep([torch.empty(0)], TieOrder(empty, 1), with_runner_up=True)
    assert (budget.num_selected, kept.mask.shape) == (0, (0,))


def test_a_budget_of_nothing_is_our_own_mistake():
    with pytest.raises(AssertionError, match="between one row"):
        BatchBudget(0, 3, Replicas()).keep([torch.rand(3)], TieOrder(torch.arange(3), 2), with_runner_up=False)
