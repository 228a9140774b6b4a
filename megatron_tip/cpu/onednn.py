"""Float32 matrix products on CPUs by the faster of two libraries: oneDNN or torch's own, MKL. Imports only torch.

Both do the same float32 arithmetic. On AMD processors MKL takes about twice as long as oneDNN; on Intel's it is the
faster one. The processor's vendor decides, not a measurement: a resumed run must repeat its numbers bit for bit, and a
busy machine would now and then choose the other library.
"""

import functools
import logging
import os
import platform
import warnings
from pathlib import Path

import torch
from torch import Tensor

_CPUINFO = Path("/proc/cpuinfo")

logger = logging.getLogger(__name__)


@functools.cache
def onednn_is_faster() -> bool:
    """Returns whether oneDNN is to multiply: wherever torch has it, but for MKL on an Intel processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return not (torch.backends.mkl.is_available() and processor_vendor() == "GenuineIntel")


def processor_vendor(cpuinfo: Path = _CPUINFO) -> str:
    """Returns the vendor's name as x86 processors give it, or else the processor's architecture."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendors = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(vendors, platform.machine())


def is_for_onednn(*tensors: Tensor) -> bool:
    """Returns whether `onednn_linear` is to multiply the tensors: float32, on a CPU, none of them empty."""
    fitting = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() for t in tensors)
    return fitting and onednn_is_faster() and bool(torch.backends.mkldnn.enabled)  # which a context may switch off


def onednn_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """Returns inputs weightᵀ, `[m, n]`, of `[m, k]` and `[n, k]`."""
    # torch.compile turns a linear layer on a CPU into this call; no public function reaches it.
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")


# Shapes whose prepared products are kept: a pass has a dozen, and another dozen for every length. Each keeps 0.6 MB
# and, because it fragments the heap, up to ten times that of freed memory which malloc cannot return.
_NUM_CACHED_SHAPES = 16


@functools.cache
def use_faster_products() -> torch.library.Library | None:
    """Makes the faster library compute `torch.mm` of float32 CPU tensors, and all that builds on it, both passes.

    Holds for the whole process: the models' layers, generation, gradients. Says in the log which library it is. Further
    calls do nothing. With oneDNN, also bounds its cache (by default 1,024 shapes and gigabytes) unless the environment
    does; oneDNN reads the bound at its first product.
    """
    name = "oneDNN" if onednn_is_faster() else "torch's own library"
    logger.info("float32 products on this processor (%s) by %s", processor_vendor(), name)
    if not onednn_is_faster():
        return None
    for bound in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's and torch's
        os.environ.setdefault(bound, str(_NUM_CACHED_SHAPES))
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # about the overridden kernel
        library.impl("mm", _mm, "CPU")
    return library  # the override lasts as long as this object


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if is_for_onednn(a, b) and a.shape[1] == b.shape[0]:  # else torch's own, with its error messages
        return onednn_linear(a, b.t())
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0)
