import pytest
import torch

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import VocabPartition, padded_vocab_size


@pytest.mark.parametrize(
    "vocab_size, tp_size, multiple_of, expected",
    [(151_936, 4, 1, 151_936), (151_665, 4, 128, 152_064), (7, 4, 1, 8), (1, 1, 1, 1), (129, 2, 64, 256)],
)
def test_padded_size_splits_into_equal_shards(vocab_size, tp_size, multiple_of, expected):
    padded = padded_vocab_size(vocab_size, tp_size, multiple_of)
    assert padded == expected
    assert padded % (tp_size * multiple_of) == 0
    assert 0 <= padded - vocab_size < tp_size * multiple_of


@pytest.mark.parametrize("arguments", [(0, 1, 1), (5, 0, 1), (5, 1, 0)])
def test_sizes_below_one_are_refused(arguments):
    with pytest.raises(InputError, match="at least 1"):
        padded_vocab_size(*arguments)


class _Rank:
    """Enough of a process group for a partition, which runs no collective."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = (lambda: rank), (lambda: size)


def test_ranks_own_each_real_id_once_and_no_padding():
    partitions = [VocabPartition.of_shard(6, 11, _Rank(rank, 4)) for rank in range(4)]
    owned = [list(range(p.vocab_start_index, p.vocab_end_index)) for p in partitions]
    assert owned == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [], []]
    assert [p.num_local for p in partitions] == [6, 5, 0, 0]
    assert {p.padded_vocab_size for p in partitions} == {24}


@pytest.mark.parametrize("vocab_size", [0, -1, 25])
def test_a_vocabulary_that_does_not_fit_the_shards_is_refused(vocab_size):
    with pytest.raises(InputError, match=r"vocab_size of 1 to 24 \(6 rows per shard x tp size 4\)"):
        VocabPartition.of_shard(6, vocab_size, _Rank(0, 4))


def test_owned_entries_are_found_by_global_id():
    partition = VocabPartition.of_shard(4, 11, _Rank(1, 3))
    values = torch.tensor([[10.0, 11, 12, 13]])
    found, is_owned = partition.owned(values, torch.tensor([[0, 4, 7, 8]]))
    assert found.tolist() == [[0, 10, 13, 0]]
    assert is_owned.tolist() == [[False, True, True, False]]
    partition.add_owned(values, torch.tensor([[4, 9]]), torch.tensor([[5.0, 7.0]]))
    assert values.tolist() == [[15, 11, 12, 13]]


def test_a_rank_of_padding_owns_nothing():
    partition = VocabPartition.of_shard(4, 8, _Rank(2, 3))
    values = torch.empty(2, 0)
    found, is_owned = partition.owned(values, torch.tensor([[0], [9]]))
    assert found.tolist() == [[0], [0]]
    assert not is_owned.any()
    partition.add_owned(values, torch.tensor([[0], [9]]), torch.ones(2, 1))
