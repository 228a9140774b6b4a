"""What malloc does with freed memory; checked in processes of their own, whose heap nobody else uses."""

import resource
from pathlib import Path

import psutil
import torch

from megatron_tip.cpu.heap import keep_freed_memory, return_freed_memory
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


def faults() -> int:
    """Returns the page faults of filling a tensor of 64 MiB after another one of that size was freed."""
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults_of_kept_memory() -> int:
    keep_freed_memory()
    return faults()


def test_large_tensors_take_the_memory_that_others_have_freed(tmp_path: Path):
    (anew,), (kept,) = run_workers(faults, 1, tmp_path), run_workers(faults_of_kept_memory, 1, tmp_path)
    assert kept < 5 < anew
