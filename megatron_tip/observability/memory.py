"""Memory use of this process."""

import resource
import sys
from pathlib import Path

import psutil
import torch


class PhaseMemory:
    """Memory use of this worker by phase of the current step.

    On a GPU, the peak of tensors since the previous phase; elsewhere the process's resident set at the end of the
    phase. Costs some microseconds per phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._step: dict[str, int] = {}

    def phase_ended(self, name: str) -> None:
        """Records the memory in use for `name`; for a phase entered twice in a step, the larger value counts."""
        self._step[name] = max(self._step.get(name, 0), self._now())

    def step_metrics(self) -> dict[str, float]:
        """Returns {"memory/<phase>_bytes": bytes} since the last call, and starts a new step."""
        step, self._step = self._step, {}
        return {f"memory/{name}_bytes": float(held) for name, held in step.items()}

    def _now(self) -> int:
        if self._device.type != "cuda":
            return self._process.memory_info().rss
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def peak_rss_bytes() -> int:
    """Returns the peak resident set of this process, without children."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, others in KiB
    # Linux's getrusage starts from the parent process's peak.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
