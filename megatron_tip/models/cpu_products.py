"""Float32 matrix products on CPUs by oneDNN for a whole process, the models' layers and generation included.

`vocab_parallel.products` says why; MKL's take about twice as long on processors that are not Intel's.
"""

import functools
import warnings

import torch
from torch import Tensor

from megatron_tip.vocab_parallel.products import by_onednn, onednn_linear


@functools.cache
def use_onednn() -> torch.library.Library:
    """From now on `torch.mm` of float32 CPU tensors, and what comes down to it, is oneDNN's: forward and backward."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is overridden
        library.impl("mm", _mm, "CPU")
    return library  # which ends the override when it goes


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if by_onednn(a, b) and a.shape[1] == b.shape[0]:  # else the message of torch's own
        return onednn_linear(a, b.t())
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0)
