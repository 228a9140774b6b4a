"""The matrix products of a chunk of rows with an output layer: the logits, and their gradients passed back.

`hidden`: `[c, H]`, `head`: `[v, H]`, `grad_logits`: `[c, v]`, all of one dtype on one device.
"""

import functools

import torch
from torch import Tensor

from megatron_tip.cpu.onednn import is_for_onednn, onednn_linear

# Rows of the head per product, if the product cannot be written directly to its destination.
_HEAD_SLICE = 2048


def logits_into(out: Tensor, hidden: Tensor, head: Tensor, scale: float) -> None:
    """Writes scale x hidden headᵀ to `[c, v]` `out`, which has the same dtype."""
    if not is_for_onednn(hidden, head):
        out.addmm_(hidden, head.T, beta=0, alpha=scale)
        return
    for columns, rows_of_head in zip(out.split(_HEAD_SLICE, 1), head.split(_HEAD_SLICE), strict=True):
        torch.mul(onednn_linear(hidden, rows_of_head), scale, out=columns)


def hidden_gradient(grad_logits: Tensor, head: Tensor) -> Tensor:
    """Returns grad_logits head: `[c, H]`."""
    return onednn_linear(grad_logits, head.T) if is_for_onednn(grad_logits, head) else grad_logits @ head


def add_head_gradient(grad_head: Tensor, grad_logits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """Adds grad_logitsᵀ hidden to float32 `[v, H]` `grad_head`, in place; for the `first` chunk, sets it."""
    if hidden.dtype == torch.float32:
        grad_head.addmm_(grad_logits.T, hidden, beta=0 if first else 1)
        return
    if adds_in_float32(hidden.dtype, hidden.device):
        _add_in_float32(grad_head, grad_logits.T, hidden, beta=0 if first else 1)
        return
    # The product has lower precision and the head's size, so it is computed and added in slices.
    for rows_of_head, columns in zip(grad_head.split(_HEAD_SLICE), grad_logits.split(_HEAD_SLICE, 1), strict=True):
        product = columns.T @ hidden
        rows_of_head.copy_(product) if first else rows_of_head.add_(product)


@functools.cache
def adds_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether torch can add a product of `dtype` operands to a float32 sum in place, by trying it once.

    CUDA's products can; not every version of torch that we allow passes it on. Tried as it is used: added to a sum, and
    set in memory that may hold NaN; with rows and without.
    """
    ones = torch.ones(8, 8, dtype=dtype, device=device)
    are_right = []
    for beta, before in ((1, 1.0), (0, torch.nan)):
        for rows in (8, 0):
            total = torch.full((8, 8), before, device=device)
            try:
                _add_in_float32(total, ones[:rows].T, ones[:rows], beta=beta)
            except (RuntimeError, TypeError):  # of torch itself: no such operator for this device, or no such argument
                return False
            are_right.append((total == beta + rows).all())
    return bool(torch.stack(are_right).all())


def _add_in_float32(total: Tensor, a: Tensor, b: Tensor, *, beta: int) -> None:
    torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
