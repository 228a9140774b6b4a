"""The peak resident set, in bytes; memory by phase."""

import subprocess
import sys

import torch

from megatron_tip.observability.memory import PhaseMemory

PROGRAM = """
from megatron_tip.observability.memory import peak_rss_bytes
before = peak_rss_bytes()
block = bytearray(b"x") * 200_000_000
del block
assert 180_000_000 < peak_rss_bytes() - before < 260_000_000, (before, peak_rss_bytes())
"""


def test_peak_counts_what_was_given_back_too():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_memory_of_a_phase_is_what_is_held_as_it_ends():
    memory = PhaseMemory(torch.device("cpu"))
    block = torch.ones(16_000_000)  # 64 MB: glibc gives back at once only what is larger than 32 MiB
    memory.phase_ended("train")
    del block
    memory.phase_ended("sync")
    metrics = memory.step_metrics()
    assert set(metrics) == {"memory/train_bytes", "memory/sync_bytes"}
    assert metrics["memory/train_bytes"] - metrics["memory/sync_bytes"] > 50e6
    assert memory.step_metrics() == {}


def test_memory_on_a_gpu_is_the_peak_since_the_phase_before(monkeypatch):
    peaks = iter([5, 9, 7])
    resets = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    memory = PhaseMemory(torch.device("cuda", 0))
    for name in ("train", "rollout", "train"):
        memory.phase_ended(name)
    assert memory.step_metrics() == {"memory/train_bytes": 7.0, "memory/rollout_bytes": 9.0}
    assert len(resets) == 3
