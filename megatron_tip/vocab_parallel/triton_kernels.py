"""The kernels of `kernels.py` in Triton, and the only file that imports it: one pass over the logits each.

Same names, arguments and results, without scratch. The logits are bfloat16 or float32, contiguous, and are read once;
arithmetic is float32. No kernel but a gradient changes them, and that writes in the logits' own dtype, which is the
dtype of the products. A maximum grows while its row is read, and the sums so far are then moved to the new frame.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from megatron_tip.vocab_parallel.kernels import NO_MAXIMUM
from megatron_tip.vocab_parallel.topk import GROUP_SIZE

VERSION = triton.__version__

TILE = 32 * GROUP_SIZE
"""Columns that the sums of a row read at a time: groups of the top-K times their columns."""

_GROUPS = tl.constexpr(TILE // GROUP_SIZE)
_LANES = tl.constexpr(GROUP_SIZE)
# Below every logit. Finite, since a frame moves by the difference of two maxima.
_LOWEST = tl.constexpr(-3e38)
_NO_MAXIMUM = tl.constexpr(NO_MAXIMUM)
# Columns per program where rows need no sums.
_BLOCK = tl.constexpr(1024)
_WARPS_OF_SUMS = 8


@triton.jit
def _tile():
    return tl.arange(0, _GROUPS)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]


@triton.jit
def _total(values):
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def _loaded(z, columns, inside):
    return tl.load(z + columns, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _store_groups(groups, top, start, width: tl.constexpr):
    number = start // _LANES + tl.arange(0, _GROUPS)
    tl.store(groups + number, top, mask=number * _LANES < width)


@triton.jit
def _raised(maximum, top):
    """Returns the maximum with that of a tile's groups, what the frame moves by (at most 0), and its exponential."""
    larger = tl.maximum(maximum, tl.max(top, axis=0))
    return larger, maximum - larger, tl.exp(maximum - larger)


@triton.jit
def _in_frame(logits, maximum, inside):
    """Returns x and e; both are 0 outside of the row."""
    x = tl.where(inside, logits - maximum, 0.0)
    return x, tl.where(inside, tl.exp(x), 0.0)


@triton.jit
def _model_sums(z, out, groups, width: tl.constexpr, first: tl.constexpr, step: tl.constexpr, size: tl.constexpr):
    """Writes a row's maximum and Σe to columns `first` and `first + step` of `size`; of 3, also Σe x and the groups."""
    row = tl.program_id(0).to(tl.int64)
    out += row * size + first
    z += row * width
    groups += row * tl.cdiv(width, _LANES)
    maximum = tl.full((), _LOWEST, tl.float32)
    sum_e = tl.zeros((_GROUPS, _LANES), tl.float32)
    sum_x = tl.zeros((_GROUPS, _LANES), tl.float32)
    for start in range(0, width, _GROUPS * _LANES):
        inside = start + _tile() < width
        logits = _loaded(z, start + _tile(), inside)
        top = tl.max(logits, axis=1)
        maximum, shift, decay = _raised(maximum, top)
        x, e = _in_frame(logits, maximum, inside)
        if size == 3:
            _store_groups(groups, top, start, width)
            sum_x = (sum_x + shift * sum_e) * decay + e * x
        sum_e = sum_e * decay + e
    tl.store(out, maximum if width > 0 else _NO_MAXIMUM)
    tl.store(out + step, _total(sum_e))
    if size == 3:
        tl.store(out + 2, _total(sum_x))


@triton.jit
def _pair_sums(z_s, z_t, out, groups, width: tl.constexpr, kind: tl.constexpr):
    """Writes a row of `statistics_sums`, `reverse_kl_sums` or `forward_kl_sums`, by `kind`, in one pass."""
    row = tl.program_id(0).to(tl.int64)
    out += row * (8 if kind == "statistics" else 5)
    z_s += row * width
    z_t += row * width
    groups_s = groups + row * tl.cdiv(width, _LANES)
    groups_t = groups_s + tl.num_programs(0) * tl.cdiv(width, _LANES)
    max_s = tl.full((), _LOWEST, tl.float32)
    max_t = tl.full((), _LOWEST, tl.float32)
    zeros = tl.zeros((_GROUPS, _LANES), tl.float32)
    sum_s, sum_t, sum_s_x, sum_t_x, sum_s_d, sum_t_d = zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, width, _GROUPS * _LANES):
        inside = start + _tile() < width
        logits_s = _loaded(z_s, start + _tile(), inside)
        logits_t = _loaded(z_t, start + _tile(), inside)
        top_s = tl.max(logits_s, axis=1)
        top_t = tl.max(logits_t, axis=1)
        max_s, shift_s, decay_s = _raised(max_s, top_s)
        max_t, shift_t, decay_t = _raised(max_t, top_t)
        x_s, e_s = _in_frame(logits_s, max_s, inside)
        x_t, e_t = _in_frame(logits_t, max_t, inside)
        if kind == "statistics":
            _store_groups(groups_s, top_s, start, width)
            _store_groups(groups_t, top_t, start, width)
            sum_s_x = (sum_s_x + shift_s * sum_s) * decay_s + e_s * x_s
            sum_t_x = (sum_t_x + shift_t * sum_t) * decay_t + e_t * x_t
        if kind != "forward_kl":
            sum_s_d = (sum_s_d + (shift_s - shift_t) * sum_s) * decay_s + e_s * (x_s - x_t)
        if kind != "reverse_kl":
            sum_t_d = (sum_t_d + (shift_s - shift_t) * sum_t) * decay_t + e_t * (x_s - x_t)
        sum_s = sum_s * decay_s + e_s
        sum_t = sum_t * decay_t + e_t
    tl.store(out, max_s if width > 0 else _NO_MAXIMUM)
    tl.store(out + 1, max_t if width > 0 else _NO_MAXIMUM)
    tl.store(out + 2, _total(sum_s))
    tl.store(out + 3, _total(sum_t))
    if kind == "statistics":
        tl.store(out + 4, _total(sum_s_x))
        tl.store(out + 5, _total(sum_t_x))
        tl.store(out + 6, _total(sum_s_d))
        tl.store(out + 7, _total(sum_t_d))
    else:
        tl.store(out + 4, _total(sum_s_d if kind == "reverse_kl" else sum_t_d))


@triton.jit
def _log_m_over_larger(log_ratio, mix_p, mix_q):
    """Returns ln(m / max(p, q)) of r = ln(q / p), from the smaller of q / p and p / q: exact for p = q."""
    u = -tl.abs(log_ratio)
    # Triton's exp and log are exact to some 1e-7 of 1, not of a small result; hence series close to 0.
    series = u * (1 + u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5 * (1 + u / 6 * (1 + u / 7))))))
    expm1 = tl.where(u > -0.35, series, tl.exp(u) - 1)
    y = tl.where(log_ratio > 0, mix_p, mix_q) * expm1
    s = y / (2 + y)
    s2 = s * s
    series = 2 * s * (1 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 / 9))))
    return tl.where(y > -0.25, series, tl.log(1 + y))


@triton.jit
def _jsd_sums(z_s, z_t, offsets, mix, out, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_s += row * width
    z_t += row * width
    max_s, max_t = tl.load(offsets + row * 4), tl.load(offsets + row * 4 + 1)
    lse_s, lse_t = tl.load(offsets + row * 4 + 2), tl.load(offsets + row * 4 + 3)
    mix_p, mix_q = tl.load(mix + row * 2), tl.load(mix + row * 2 + 1)
    student = tl.zeros((_GROUPS, _LANES), tl.float32)
    teacher = tl.zeros((_GROUPS, _LANES), tl.float32)
    for start in range(0, width, _GROUPS * _LANES):
        inside = start + _tile() < width
        log_p = tl.where(inside, _loaded(z_s, start + _tile(), inside) - max_s - lse_s, 0.0)
        log_q = tl.where(inside, _loaded(z_t, start + _tile(), inside) - max_t - lse_t, 0.0)
        log_ratio = log_q - log_p
        rest = _log_m_over_larger(log_ratio, mix_p, mix_q)
        student -= tl.where(inside, tl.exp(log_p) * (tl.maximum(log_ratio, 0.0) + rest), 0.0)
        teacher += tl.where(inside, tl.exp(log_q) * (tl.minimum(log_ratio, 0.0) - rest), 0.0)
    tl.store(out + row * 2, _total(student))
    tl.store(out + row * 2 + 1, _total(teacher))


@triton.jit
def _pair_gradient(z_s, z_t, offsets, mix, rows, width: tl.constexpr, kind: tl.constexpr):
    """Writes a block of a row's gradient over the student's logits. `rows`: value and weight, or the weight alone."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    inside = columns < width
    z_s += row * width
    z_t += row * width
    max_s, max_t = tl.load(offsets + row * 4), tl.load(offsets + row * 4 + 1)
    lse_s, lse_t = tl.load(offsets + row * 4 + 2), tl.load(offsets + row * 4 + 3)
    x_s = _loaded(z_s, columns, inside) - max_s
    x_t = _loaded(z_t, columns, inside) - max_t
    p = tl.exp(x_s - lse_s)
    if kind == "forward_kl":
        gradient = (p - tl.exp(x_t - lse_t)) * tl.load(rows + row)
    else:
        value, weight = tl.load(rows + row * 2), tl.load(rows + row * 2 + 1)
        if kind == "reverse_kl":
            gradient = p * (x_s - x_t + (lse_t - lse_s - value)) * weight
        else:
            mix_p, mix_q = tl.load(mix + row * 2), tl.load(mix + row * 2 + 1)
            log_ratio = (x_t - lse_t) - (x_s - lse_s)
            log_m_over_p = tl.maximum(log_ratio, 0.0) + _log_m_over_larger(log_ratio, mix_p, mix_q)
            gradient = p * (-log_m_over_p - value) * weight
    tl.store(z_s + columns, gradient.to(z_s.dtype.element_ty), mask=inside)


@triton.jit
def _scaled_probabilities(z, rows, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    inside = columns < width
    z += row * width
    maximum, lse, scale = tl.load(rows + row * 3), tl.load(rows + row * 3 + 1), tl.load(rows + row * 3 + 2)
    gradient = tl.exp(_loaded(z, columns, inside) - maximum - lse) * scale
    tl.store(z + columns, gradient.to(z.dtype.element_ty), mask=inside)


def statistics_sums(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `kernels.statistics_sums` returns."""
    groups = _empty(z_s, 2, len(z_s), triton.cdiv(z_s.shape[1], GROUP_SIZE))
    return _sums_of_pair(z_s, z_t, groups, "statistics"), groups[0], groups[1]


def reverse_kl_sums(z_s: Tensor, z_t: Tensor) -> tuple[Tensor]:
    """Returns what `kernels.reverse_kl_sums` returns. Does not change the logits."""
    return (_sums_of_pair(z_s, z_t, _empty(z_s, 0), "reverse_kl"),)


def forward_kl_sums(z_s: Tensor, z_t: Tensor) -> tuple[Tensor]:
    """Returns what `kernels.forward_kl_sums` returns. Does not change the logits."""
    return (_sums_of_pair(z_s, z_t, _empty(z_s, 0), "forward_kl"),)


def partition_sums(*models: Tensor) -> tuple[Tensor]:
    """Returns what `kernels.partition_sums` returns."""
    (rows, width), m = models[0].shape, len(models)
    out = _empty(models[0], rows, 2 * m)
    for number, z in enumerate(models):
        _launch(_model_sums, (rows,), z, out, _empty(z, 0), width, number, m, 2 * m, num_warps=_WARPS_OF_SUMS)
    return (out,)


def entropy_and_topk_sums(z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `kernels.entropy_and_topk_sums` returns."""
    rows, width = z.shape
    out, groups = _empty(z, rows, 3), _empty(z, rows, triton.cdiv(width, GROUP_SIZE))
    _launch(_model_sums, (rows,), z, out, groups, width, 0, 1, 3, num_warps=_WARPS_OF_SUMS)
    return out, groups


def jsd_sums(z_s: Tensor, z_t: Tensor, offsets: Tensor, mix: Tensor) -> tuple[Tensor]:
    """Returns what `kernels.jsd_sums` returns. Does not change the logits."""
    rows, width = z_s.shape
    out = _empty(z_s, rows, 2)
    _launch(_jsd_sums, (rows,), z_s, z_t, offsets, mix, out, width, num_warps=_WARPS_OF_SUMS)
    return (out,)


def reverse_kl_gradient(z_s: Tensor, z_t: Tensor, offsets: Tensor, rows: Tensor) -> tuple[()]:
    """Does what `kernels.reverse_kl_gradient` does, from unchanged logits."""
    return _gradient_of_pair(z_s, z_t, offsets, offsets, rows, "reverse_kl")


def forward_kl_gradient(z_s: Tensor, z_t: Tensor, offsets: Tensor, rows: Tensor) -> tuple[()]:
    """Does what `kernels.forward_kl_gradient` does, from unchanged logits."""
    return _gradient_of_pair(z_s, z_t, offsets, offsets, rows, "forward_kl")


def jsd_gradient(z_s: Tensor, z_t: Tensor, offsets: Tensor, mix: Tensor, rows: Tensor) -> tuple[()]:
    """Does what `kernels.jsd_gradient` does, from unchanged logits."""
    return _gradient_of_pair(z_s, z_t, offsets, mix, rows, "jsd")


def scaled_probabilities(z: Tensor, rows: Tensor) -> tuple[()]:
    """Does what `kernels.scaled_probabilities` does."""
    _launch(_scaled_probabilities, _grid_of_blocks(z), z, rows, z.shape[1])
    return ()


def _sums_of_pair(z_s: Tensor, z_t: Tensor, groups: Tensor, kind: str) -> Tensor:
    rows, width = z_s.shape
    out = _empty(z_s, rows, 8 if kind == "statistics" else 5)
    _launch(_pair_sums, (rows,), z_s, z_t, out, groups, width, kind, num_warps=_WARPS_OF_SUMS)
    return out


def _gradient_of_pair(z_s: Tensor, z_t: Tensor, offsets: Tensor, mix: Tensor, rows: Tensor, kind: str) -> tuple[()]:
    _launch(_pair_gradient, _grid_of_blocks(z_s), z_s, z_t, offsets, mix, rows, z_s.shape[1], kind)
    return ()


def _grid_of_blocks(z: Tensor) -> tuple[int, int]:
    return len(z), triton.cdiv(z.shape[1], _BLOCK.value)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: int) -> None:
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    assert all(tensor.is_contiguous() for tensor in tensors), "the kernels address rows without strides"
    if all(grid):
        kernel[grid](*arguments, **options)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
