import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tip.vocab_parallel.partition import VocabPartition
from megatron_tip.vocab_parallel.topk import exchange_topk, group_maxima, local_topk


def expected_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def full_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    partition = VocabPartition.of_shard(logits.shape[1], None, None)
    _, [(values, ids)] = exchange_topk([logits], [group_maxima(logits)], torch.zeros(len(logits), 1), k, partition)
    return values, ids


@pytest.mark.parametrize("width", [1, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("k", [1, 2, 16, 64])
def test_matches_a_stable_sort_of_random_logits(width, k):
    logits = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    k = min(k, width)
    values, ids = full_topk(logits, k)
    expected_values, expected_ids = expected_topk(logits, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 3), st.integers(0, 2**31))
def test_ties_go_to_the_lower_id(width, k, num_values, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(-num_values, num_values + 1, (3, width), generator=g) / 2
    logits = logits * torch.where(torch.arange(width) % 2 == 0, 1.0, -1.0)  # brings -0.0 beside 0.0
    k = min(k, width)
    assert torch.equal(full_topk(logits, k)[1], expected_topk(logits, k)[1])


def test_extreme_values_are_in_order():
    logits = torch.tensor([[-3e38, 1e-40, -1e-40, 3e38, 0.0, float("-inf"), 1.0, -1.0]])
    assert full_topk(logits, 8)[1].tolist() == [[3, 6, 1, 4, 2, 7, 0, 5]]


@pytest.mark.parametrize("width", [0, 3, 70])
def test_a_shard_smaller_than_k_is_filled_up_with_what_never_wins(width):
    logits = torch.randn(2, width)
    values, columns = local_topk(logits, group_maxima(logits), 100)
    assert values.shape == columns.shape == (2, 100)
    assert torch.equal(columns[:, :width], expected_topk(logits, width)[1])
    assert (values[:, width:] == float("-inf")).all()
    assert (columns[:, width:] >= width).all()
