"""Timing of a step's phases."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


class PhaseTimer:
    """A timer of wall-clock seconds by phase, for the current step and the whole run.

    On a GPU, with `synchronize`, it waits for the device before each reading of the clock: work is asynchronous, and a
    phase would otherwise be charged for what an earlier one started. A phase entered twice in a step adds up.
    `on_enter` receives the name of each phase as it begins; `on_exit` its name, start (time.perf_counter) and seconds.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        synchronize: bool = True,
        on_enter: Callable[[str], None] | None = None,
        on_exit: Callable[[str, float, float], None] | None = None,
    ) -> None:
        self._on_enter = on_enter or (lambda _: None)
        self._on_exit = on_exit or (lambda *_: None)
        self._synchronizes = synchronize and device.type == "cuda"
        self._device = device
        self._start = time.perf_counter()
        self._step: dict[str, float] = {}
        self._total: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the block's time to `name`, even if it raises."""
        self._on_enter(name)
        start = self._now()
        try:
            yield
        finally:
            seconds = self._now() - start
            self._step[name] = self._step.get(name, 0.0) + seconds
            self._total[name] = self._total.get(name, 0.0) + seconds
            self._on_exit(name, start, seconds)

    def seconds(self, name: str) -> float:
        """Returns the seconds that the phase has taken in the current step so far."""
        return self._step.get(name, 0.0)

    def step_metrics(self) -> dict[str, float]:
        """Returns {"time/<phase>_seconds": seconds} since the last call, and starts a new step."""
        step, self._step = self._step, {}
        return {f"time/{name}_seconds": seconds for name, seconds in step.items()}

    def total_seconds(self) -> dict[str, float]:
        """Returns the seconds of every phase over the run and, as "total", those since construction."""
        return {"total": self._now() - self._start, **self._total}

    def resume(self, total_seconds: Mapping[str, float]) -> None:
        """Continues from what `total_seconds` returned in an earlier process."""
        total = dict(total_seconds)
        self._start = self._now() - total.pop("total")
        self._total = total

    def _now(self) -> float:
        if self._synchronizes:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
