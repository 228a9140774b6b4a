"""Memory that malloc holds back goes to the system; checked in a process of its own, whose heap nobody else uses."""

from pathlib import Path

import psutil
import torch

from megatron_tip.cpu.heap import return_freed_memory
from tests.helpers.distributed import run_workers

_BLOCK = 2**16
"""Bytes of a tensor that malloc puts into its heap instead of a mapping."""


def fragments() -> tuple[int, int]:
    """Returns the resident memory before and after the call; every other block of a heap of 128 MB is free."""
    blocks = [torch.ones(_BLOCK // 4) for _ in range(2048)]
    kept = blocks[1::2]
    del blocks
    before = psutil.Process().memory_info().rss
    return_freed_memory()
    assert len(kept) == 1024
    return before, psutil.Process().memory_info().rss


def test_gaps_between_living_tensors_are_returned(tmp_path: Path):
    before, after = run_workers(fragments, 1, tmp_path)[0]
    assert before - after > 30e6
