"""Memory that was freed but that malloc still holds. Imports only the standard library."""

import ctypes
import functools
from collections.abc import Callable


def return_freed_memory() -> None:
    """Returns to the system what malloc holds of freed memory; does nothing without glibc.

    Tensors of many different sizes, each of some megabytes, leave gaps in the heap that no later one fits. Takes
    milliseconds.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
