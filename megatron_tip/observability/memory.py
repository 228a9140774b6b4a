"""Memory of this process."""

import resource
import sys


def peak_rss_bytes() -> int:
    """Returns the largest resident set that this process has had, children not included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
