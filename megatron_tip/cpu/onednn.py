"""Float32 matrix products on CPUs by oneDNN. Imports only torch.

torch uses MKL for them, which takes about twice as long on AMD processors. oneDNN, which torch also ships, does the
same float32 arithmetic.
"""

import functools
import os
import warnings

import torch
from torch import Tensor


def is_for_onednn(*tensors: Tensor) -> bool:
    """Returns whether `onednn_linear` can multiply the tensors: float32, on a CPU, none of them empty."""
    fitting = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() for t in tensors)
    return fitting and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def onednn_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """Returns inputs weightᵀ, `[m, n]`, of `[m, k]` and `[n, k]`."""
    # torch.compile turns a linear layer on a CPU into this call; no public function reaches it.
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")


# Shapes whose prepared products are kept: a pass has a dozen, and another dozen for every length. Each keeps 0.6 MB
# and, because it fragments the heap, up to ten times that of freed memory which malloc cannot return.
_NUM_CACHED_SHAPES = 16


@functools.cache
def use_onednn() -> torch.library.Library:
    """Makes oneDNN compute `torch.mm` of float32 CPU tensors, and all that builds on it, forward and backward.

    Holds for the whole process: the models' layers, generation, gradients. Further calls do nothing. Also bounds
    oneDNN's cache (by default 1,024 shapes and gigabytes) unless the environment does; oneDNN reads the bound at its
    first product.
    """
    for name in (
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
    ):  # oneDNN's and torch's
        os.environ.setdefault(name, str(_NUM_CACHED_SHAPES))
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # about the overridden kernel
        library.impl("mm", _mm, "CPU")
    return library  # the override lasts as long as this object


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if is_for_onednn(a, b) and a.shape[1] == b.shape[0]:  # else torch's own, with its error messages
        return onednn_linear(a, b.t())
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0)
