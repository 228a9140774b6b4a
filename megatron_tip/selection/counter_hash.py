"""Randomness without a generator: a hash of (seed, step, rollout, position), independent of the layout."""

import torch
from torch import Tensor

from megatron_tip.records import TokenIndex


def _signed(value: int) -> int:
    """Returns the int64 with the low 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Returns the unsigned (zero-filling) right shift of int64 `x`."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Returns the next output of splitmix64 (Steele, Lea, Flood 2014) from state `x`: a bijection of int64."""
    x = x + _INCREMENT
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def _hash(*parts: Tensor) -> Tensor:
    """Returns the int64 hash of int64 `parts`, broadcast against each other."""
    state = torch.zeros_like(parts[0])
    for part in parts:
        state = _mix(state ^ _mix(part))
    return state


def uniform(seed: int, step: int, index: TokenIndex, *, stream: int = 0) -> Tensor:
    """Returns numbers strictly between 0 and 1, `[n]` float64, from (seed, stream, step, rollout_index, position).

    `stream` separates draws of one step that must be independent.
    """
    counters = torch.tensor([_signed(seed), stream, step], dtype=torch.int64, device=index.position.device)
    state = _hash(*counters.unbind(), index.rollout_index, index.position)
    # 52 bits plus a half: the sum is exact in float64, and neither 0 nor 1
    return (_shift_right(state, 12).to(torch.float64) + 0.5) * 2.0**-52


def shuffled(keys: Tensor, key_bits: int, seed: int, step: int) -> Tensor:
    """Returns `[n]` int64 keys under a pseudo-random permutation of [0, 2^key_bits): distinct keys stay distinct."""
    counters = torch.tensor([_signed(seed), step], dtype=torch.int64, device=keys.device)
    salt = _hash(*counters.unbind())
    mask = (1 << key_bits) - 1
    for multiplier in (*_MULTIPLIERS, _INCREMENT):
        # addition, multiplication by an odd number and xor-shift are each bijective on key_bits bits
        keys = ((keys ^ (salt & mask)) * multiplier) & mask
        keys = keys ^ (keys >> (key_bits + 1) // 2)
        salt = _mix(salt)
    return keys
