"""Float32 matrix products on CPUs by oneDNN. Imports torch alone.

torch makes them with MKL, which takes about twice as long on AMD processors; oneDNN, which torch brings as well, does
the same float32 arithmetic.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor


def is_for_onednn(*tensors: Tensor) -> bool:
    """Whether a product of the tensors is one for `onednn_linear`: float32, on a CPU, none of them empty."""
    fitting = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() for t in tensors)
    return fitting and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def onednn_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """`[m, n]` inputs weightᵀ of `[m, k]` and `[n, k]`."""
    # What torch.compile makes of a linear layer on a CPU; no public function leads to it.
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")


# Shapes whose prepared products are kept: a pass has a dozen, and a dozen others with every length. Each keeps 0.6 MB
# and, by lying in between, up to ten times that of freed memory which malloc cannot give back.
_NUM_CACHED_SHAPES = 16


@functools.cache
def use_onednn() -> torch.library.Library:
    """From now on `torch.mm` of float32 CPU tensors, and what comes down to it, is oneDNN's: forward and backward.

    For the whole process: the models' layers, generation, gradients. Further calls do nothing. Bounds what oneDNN
    keeps, by default 1,024 shapes and gigabytes, where the environment does not; it is read at its first product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # of oneDNN, and of torch's calls of it
        os.environ.setdefault(name, str(_NUM_CACHED_SHAPES))
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is overridden
        library.impl("mm", _mm, "CPU")
    return library  # which ends the override when it goes


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if is_for_onednn(a, b) and a.shape[1] == b.shape[0]:  # else torch's own, with its messages
        return onednn_linear(a, b.t())
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0)
