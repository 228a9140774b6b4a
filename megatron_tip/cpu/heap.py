"""Memory that was freed: malloc returns it to the system, or keeps it. Imports only the standard library."""

import ctypes
import functools
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""glibc's M_TRIM_THRESHOLD (-1: give nothing back) and M_MMAP_MAX (how many blocks may lie outside of the heap)."""


def return_freed_memory() -> None:
    """Returns to the system what malloc holds of freed memory; does nothing without glibc.

    Tensors of many different sizes, each of some megabytes, leave gaps in the heap that no later one fits. Takes
    milliseconds.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed for the rest of this process's life; does nothing without glibc.

    By default each tensor of more than 32 MiB is memory that the system gives anew, and the first touch of its pages
    takes longer than simple arithmetic on it. For a short-lived process whose large tensors have a few sizes.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
