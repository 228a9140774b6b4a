"""Radix selection against numpy on the gathered array: equal, not close."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_tip.selection.order_statistics import order_statistics, ordered_keys, quantiles, value_of_key
from megatron_tip.selection.replicas import Replicas
from tools.simulated_replicas import SimulatedReplica, run_simulated

PROPERTY = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
AWKWARD = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.0, 1.0000001, -1.0, 3.4028235e38, -3.4028235e38]
VALUES = st.one_of(st.sampled_from(AWKWARD), st.floats(width=32, allow_nan=False, allow_infinity=False))
SHARDS = st.lists(st.lists(VALUES, max_size=12), min_size=1, max_size=5).filter(any)
PROBABILITIES = [0.0, 0.05, 0.3, 0.5, 0.95, 0.98, 1.0]


def float32(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def quantiles_of(shards: list[torch.Tensor]) -> list[list[float]]:
    """Each replica's answer for all probabilities."""
    wanted = [("z", p) for p in PROBABILITIES]
    num_values = sum(len(shard) for shard in shards)

    def work(replica: SimulatedReplica) -> list[float]:
        found = quantiles({"z": shards[replica.rank]}, wanted, num_values, replica)
        return [found[key] for key in wanted]

    return run_simulated(work, len(shards))


@PROPERTY
@given(SHARDS)
@example([[7.0]])
@example([[], [7.0], []])
@example([[0.0, -0.0], [-0.0], [0.0]])
@example([[2.5] * 9, [2.5], []])
@example([[1e-45, 0.0, -1e-45], [1.4e-45]])
@example([[3.4028235e38], [-3.4028235e38]])
def test_quantiles_equal_numpy(shards):
    gathered = np.array([value for shard in shards for value in shard], dtype=np.float32).astype(np.float64)
    expected = [float(np.quantile(gathered, p)) for p in PROBABILITIES]
    for answer in quantiles_of([float32(shard) for shard in shards]):
        assert answer == expected


@PROPERTY
@given(SHARDS)
@example([[0.0, -0.0, 0.0]])
def test_order_statistics_equal_a_sort(shards):
    gathered = np.sort(np.array([value for shard in shards for value in shard], dtype=np.float32))
    ranks = list(range(len(gathered)))
    (found,) = run_simulated(
        lambda replica: order_statistics([ordered_keys(float32(shards[replica.rank]))], [ranks], 32, replica)[0],
        len(shards),
    )[-1:]
    for statistic, value in zip(found, gathered, strict=True):
        assert value_of_key(statistic.key) == value
        assert statistic.num_below == (gathered < value).sum()
        assert statistic.num_equal == (gathered == value).sum()


@PROPERTY
@given(VALUES, VALUES)
def test_keys_are_ordered_as_the_values(a, b):
    key_a, key_b = ordered_keys(float32([a, b])).tolist()
    a, b = float32([a, b]).tolist()
    assert (key_a < key_b, key_a == key_b) == (a < b, a == b)
    assert 0 <= key_a < 2**32
    assert value_of_key(key_a) == a


def test_infinities_have_keys():
    keys = ordered_keys(float32([-math.inf, -3.4028235e38, 3.4028235e38, math.inf])).tolist()
    assert keys == sorted(set(keys))
    assert [value_of_key(key) for key in (keys[0], keys[3])] == [-math.inf, math.inf]


@pytest.mark.parametrize("num_replicas", [1, 7, 64])
def test_quantiles_of_a_large_skewed_batch(num_replicas):
    values = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) ** 8
    owner = torch.randint(num_replicas, (50_000,), generator=torch.Generator().manual_seed(1))
    answers = quantiles_of([values[owner == replica] for replica in range(num_replicas)])
    expected = [float(np.quantile(values.double().numpy(), p)) for p in PROBABILITIES]
    assert answers == [expected] * num_replicas


@pytest.mark.parametrize("key_bits", [1, 5, 11, 12, 40, 62])
def test_keys_of_any_width(key_bits):
    keys = torch.randint(2**key_bits, (300,), generator=torch.Generator().manual_seed(key_bits))
    ranks = [0, 17, 299]
    (found,) = order_statistics([keys], [ranks], key_bits, Replicas())
    assert [statistic.key for statistic in found] == keys.sort().values[ranks].tolist()


def test_bytes_and_collectives_do_not_depend_on_the_number_of_values():
    def sent(num_values: int) -> list[int]:
        values = torch.rand(num_values, generator=torch.Generator().manual_seed(0))

        def work(replica: SimulatedReplica) -> list[int]:
            quantiles({"z": values}, [("z", 0.05)], 2 * num_values, replica)
            return replica.sent_bytes

        return run_simulated(work, 2)[0]

    assert len(sent(100)) == len(sent(100_000)) == 3
    assert sum(sent(100_000)) <= sum(sent(100)) < 64 * 1024


def test_nothing_wanted_costs_nothing():
    assert quantiles({"z": float32([1.0])}, [], 1, Replicas()) == {}
    assert order_statistics([], [], 32, Replicas()) == []


def test_a_replica_that_leaves_a_collective_out_is_noticed():
    def work(replica: SimulatedReplica) -> None:
        if replica.rank == 1:
            raise ValueError("rank 1 stops")
        replica.sum(torch.zeros(1))

    with pytest.raises(ValueError, match="rank 1 stops"):
        run_simulated(work, 3)
