"""The peak resident set, in bytes."""

import subprocess
import sys

PROGRAM = """
from megatron_tip.observability.memory import peak_rss_bytes
before = peak_rss_bytes()
block = bytearray(b"x") * 200_000_000
del block
assert 180_000_000 < peak_rss_bytes() - before < 260_000_000, (before, peak_rss_bytes())
"""


def test_peak_counts_what_was_given_back_too():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
