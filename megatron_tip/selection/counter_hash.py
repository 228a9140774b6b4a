"""Randomness without a generator: a hash of (seed, step, rollout, position), so that no layout can change a draw."""

from __future__ import annotations

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


def uniform(seed: int, step: int, index: TokenIndex) -> Tensor:
    """Returns `[n]` float64 strictly between 0 and 1, a function of (seed, step, rollout_index, position) alone."""
    state = torch.tensor(_signed(seed), dtype=torch.int64, device=index.position.device)
    for part in (torch.full_like(state, _signed(step)), index.rollout_index, index.position):
        state = _mix(state ^ _mix(part))
    # 52 bits and a half: the sum is exact in float64 and neither 0 nor 1
    return (_shift_right(state, 12).to(torch.float64) + 0.5) * 2.0**-52
