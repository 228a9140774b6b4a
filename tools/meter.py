"""Seconds and peak memory of a call, on a CPU or on a GPU. Needs torch alone, so that any interpreter can import it."""

import ctypes
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """One call's figures.

    `peak_bytes`: the most memory above what was held before the call: on a CPU of the resident set, on a GPU of what
    torch's allocator handed out. `seconds` on a GPU: between two events on its stream.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def read_call(
    call: Callable[[], T], device: torch.device, *, at_start: Callable[[], None] = lambda: None
) -> tuple[Reading, T]:
    """Returns the figures of `call` and its result. Before it, garbage is collected and `at_start` runs."""
    before = _held_bytes_after_cleaning(device)
    at_start()
    start, cpu_start = _Clock(device), time.process_time()
    result = call()
    seconds = start.seconds()
    cpu_seconds = time.process_time() - cpu_start
    return Reading(seconds, cpu_seconds, max(0, _peak_bytes(device) - before)), result


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of `call`, without a look at memory."""
    clock = _Clock(device)
    call()
    return clock.seconds()


def host_waits(call: Callable[[], object]) -> int:
    """Returns how often `call` makes the host wait for the GPU, as far as torch notices."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


class _Clock:
    """A clock that starts when it is made, once the device has done its earlier work."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda.synchronize(device)
            self._events[0].record()
        self._start = time.perf_counter()

    def seconds(self) -> float:
        if not self._on_gpu:
            return time.perf_counter() - self._start
        start, end = self._events
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _held_bytes_after_cleaning(device: torch.device) -> int:
    """Returns free memory to the system (on a CPU), resets the peak, and returns the bytes held after that."""
    gc.collect()
    if device.type == "cuda":  # what the allocator keeps stays there: to get it from the driver again would be timed
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024
