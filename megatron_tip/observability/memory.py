"""Memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch


class PhaseMemory:
    """Memory of this worker by phase, of the current step: on a GPU the most that tensors held since the phase before,
    elsewhere the process's resident set as the phase ends. Costs some microseconds a phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._step: dict[str, int] = {}

    def phase_ended(self, name: str) -> None:
        """Charges what is in use to `name`; of a phase entered twice in a step, the larger counts."""
        self._step[name] = max(self._step.get(name, 0), self._now())

    def step_metrics(self) -> dict[str, float]:
        """Returns {"memory/<phase>_bytes": bytes} since the last call, and begins a new step."""
        step, self._step = self._step, {}
        return {f"memory/{name}_bytes": float(held) for name, held in step.items()}

    def _now(self) -> int:
        if self._device.type != "cuda":
            return self._process.memory_info().rss
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def peak_rss_bytes() -> int:
    """Returns the largest resident set that this process has had, children not included."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, others in KiB
    # Linux's getrusage starts from the peak of the process that started this one.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
