"""The matrix products of a chunk of rows with an output layer: its logits, and the gradients behind theirs.

`hidden`: `[c, H]`, `head`: `[v, H]`, `grad_logits`: `[c, v]`, all of one dtype on one device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the head whose product is made at a time where it cannot be made in the memory that it is to lie in.
_HEAD_SLICE = 2048


def logits_into(out: Tensor, hidden: Tensor, head: Tensor, scale: float) -> None:
    """Writes scale x hidden headᵀ into `[c, v]` `out`, of the same dtype."""
    if not by_onednn(hidden, head):
        out.addmm_(hidden, head.T, beta=0, alpha=scale)
        return
    for columns, rows_of_head in zip(out.split(_HEAD_SLICE, 1), head.split(_HEAD_SLICE), strict=True):
        torch.mul(onednn_linear(hidden, rows_of_head), scale, out=columns)


def hidden_gradient(grad_logits: Tensor, head: Tensor) -> Tensor:
    """`[c, H]` grad_logits head."""
    return onednn_linear(grad_logits, head.T) if by_onednn(grad_logits, head) else grad_logits @ head


def add_head_gradient(grad_head: Tensor, grad_logits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """Adds grad_logitsᵀ hidden to float32 `[v, H]` `grad_head`, in place; for the `first` chunk, sets it."""
    if hidden.dtype == torch.float32:
        grad_head.addmm_(grad_logits.T, hidden, beta=0 if first else 1)
        return
    # A product of lower precision, as large as the head, is made and added slice by slice.
    for rows_of_head, columns in zip(grad_head.split(_HEAD_SLICE), grad_logits.split(_HEAD_SLICE, 1), strict=True):
        product = columns.T @ hidden
        rows_of_head.copy_(product) if first else rows_of_head.add_(product)


def by_onednn(*tensors: Tensor) -> bool:
    """Whether a product of the tensors is for `onednn_linear`."""
    # torch makes float32 products on CPUs with MKL, which leaves AVX-512 unused on processors that are not Intel's.
    # oneDNN, which torch brings as well, takes half the time there for the same float32 arithmetic. Not empty ones.
    on_cpu = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() for t in tensors)
    return on_cpu and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def onednn_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """`[m, n]` inputs weightᵀ of `[m, k]` and `[n, k]` CPU tensors."""
    # What torch.compile makes of a linear layer on a CPU; no public function leads to it.
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
