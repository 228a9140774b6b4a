"""Memory of this process."""

import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Returns the largest resident set that this process has had, children not included."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, others in KiB
    # Linux's getrusage starts from the peak of the process that started this one.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
