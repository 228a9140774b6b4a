"""Exact order statistics of scores that are distributed over data-parallel replicas, without gathering them.

Radix selection: keys are non-negative integers in the order of the scores. Each pass counts the next 11 bits of the
keys that can still be the wanted one, and one all-reduce adds the counts of all replicas. Float32 scores take 3 passes
(11 + 11 + 10 bits), whatever the number of tokens or replicas. All order statistics of all score vectors share the
passes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.selection.replicas import Replicas

Quantiles = dict[tuple[str, float], float]

DIGIT_BITS = 11
FLOAT_KEY_BITS = 32


def ordered_keys(values: Tensor) -> Tensor:
    """Returns int64 keys in [0, 2^32) in the order of the float32 `values`.

    -0.0 and 0.0 get the same key, as they compare equal. NaN gets a key beyond the infinities.
    """
    bits = (values + 0.0).view(torch.int32)
    return _flip_negative(bits).to(torch.int64).add_(2**31)


def value_of_key(key: int) -> float:
    """Returns the float32 value that `ordered_keys` maps to `key`."""
    return float(_flip_negative(torch.tensor(key - 2**31, dtype=torch.int32)).view(torch.float32))


def _flip_negative(bits: Tensor) -> Tensor:
    """Returns int32 in the order of the floats with these `bits`. It is its own inverse."""
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


@dataclass
class OrderStatistic:
    """The `rank`-th smallest key (0-based) of all replicas, how many keys are below it and how many equal to it."""

    rank: int
    key: int = 0
    num_below: int = 0
    num_equal: int = 0


def order_statistics(
    vectors: Sequence[Tensor], ranks: Sequence[Sequence[int]], key_bits: int, replicas: Replicas
) -> list[list[OrderStatistic]]:
    """Returns, for each vector, the order statistics of the wanted ranks, the same on all replicas.

    Args:
        vectors: each `[n]` int64 keys in [0, 2^key_bits), this replica's part; n may be 0 and may differ by replica.
        ranks: for each vector, the wanted 0-based ranks, below its length over all replicas (at most 2^31 - 1), and the
            same on all replicas.
        key_bits: at most 63.

    Collectives: ceil(key_bits / 11) all-reduces, each of 8 KiB for every vector and distinct prefix still searched.
    """
    found = [[OrderStatistic(rank) for rank in wanted] for wanted in ranks]
    candidates = {(place, 0): keys for place, (keys, wanted) in enumerate(zip(vectors, ranks, strict=True)) if wanted}
    remaining_bits = key_bits if candidates else 0
    while remaining_bits > 0:
        width = min(DIGIT_BITS, remaining_bits)
        remaining_bits -= width
        counts = replicas.sum(_count_digits(list(candidates.values()), remaining_bits, width))
        cumulative = dict(zip(candidates, counts.to("cpu", torch.int64).cumsum(dim=1), strict=True))
        narrowed: dict[tuple[int, int], Tensor] = {}
        for place, statistics in enumerate(found):
            for statistic in statistics:
                parent = (place, statistic.key)
                _descend(statistic, cumulative[parent], width)
                child = (place, statistic.key)
                if child not in narrowed:
                    keys = candidates[parent]
                    narrowed[child] = keys[(keys >> remaining_bits) == statistic.key]
        candidates = narrowed
    return found


def _count_digits(vectors: list[Tensor], shift: int, width: int) -> Tensor:
    """Returns `[len(vectors), 2^width]` int32: how often each digit occurs. int32 halves the bytes sent."""
    mask = (1 << width) - 1
    counts = [torch.bincount((keys >> shift) & mask, minlength=1 << width) for keys in vectors]
    return torch.stack(counts).to(torch.int32)


def _descend(statistic: OrderStatistic, cumulative: Tensor, width: int) -> None:
    """Moves `statistic` into the bin of `cumulative` (counts of its prefix) that holds its rank."""
    digit = int(torch.searchsorted(cumulative, statistic.rank - statistic.num_below, right=True))
    assert digit < cumulative.numel(), f"rank {statistic.rank} is not below the number of keys"
    below = int(cumulative[digit - 1]) if digit else 0
    statistic.num_below += below
    statistic.num_equal = int(cumulative[digit]) - below
    statistic.key = (statistic.key << width) | digit


def quantiles(
    values: Mapping[str, Tensor], wanted: Iterable[tuple[str, float]], num_values: int, replicas: Replicas
) -> Quantiles:
    """Returns the quantile of each wanted (name, probability) over all replicas, the same on all of them.

    Interpolates linearly in float64 between the two neighbouring float32 values, with the same operations as
    `numpy.quantile(gathered.astype(float64), probability)`.

    Args:
        values: `[n]` float32 by name, finite; this replica's part.
        wanted: the same on all replicas; probabilities in [0, 1].
        num_values: length of each vector over all replicas, at least 1.

    Collectives: 3 all-reduces in total.
    """
    probabilities: dict[str, list[float]] = {}
    for name, probability in sorted(set(wanted)):
        probabilities.setdefault(name, []).append(probability)
    neighbours = {name: [_neighbours(p, num_values) for p in ps] for name, ps in probabilities.items()}
    found = order_statistics(
        [ordered_keys(values[name]) for name in probabilities],
        [[rank for low, high, _ in places for rank in (low, high)] for places in neighbours.values()],
        FLOAT_KEY_BITS,
        replicas,
    )
    result: Quantiles = {}
    for name, statistics in zip(probabilities, found, strict=True):
        points = [value_of_key(statistic.key) for statistic in statistics]
        pairs = zip(points[::2], points[1::2], strict=True)
        for probability, (low, high), (*_, fraction) in zip(probabilities[name], pairs, neighbours[name], strict=True):
            result[name, probability] = _interpolate(low, high, fraction)
    return result


def _neighbours(probability: float, num_values: int) -> tuple[int, int, float]:
    """Returns the ranks on both sides of the quantile and the weight of the upper one."""
    place = (num_values - 1) * probability
    low = min(math.floor(place), num_values - 1)
    return low, min(low + 1, num_values - 1), place - low


def _interpolate(low: float, high: float, fraction: float) -> float:
    """Returns numpy's `_lerp(low, high, fraction)`, which starts from the nearer end and so is monotonic."""
    return high - (high - low) * (1 - fraction) if fraction >= 0.5 else low + (high - low) * fraction
