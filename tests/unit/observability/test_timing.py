"""Seconds by phase, on a clock that the test moves."""

import time

import pytest
import torch

from megatron_tip.observability.timing import PhaseTimer


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


def test_phases_add_up_by_step_and_over_the_run(clock):
    timer = PhaseTimer(torch.device("cpu"))
    for name, seconds in (("rollout", 3.0), ("train", 2.0), ("rollout", 1.0)):
        with timer.phase(name):
            clock.now += seconds
    assert timer.step_metrics() == {"time/rollout_seconds": 4.0, "time/train_seconds": 2.0}
    clock.now += 10.0
    with timer.phase("train"):
        clock.now += 5.0
    assert timer.step_metrics() == {"time/train_seconds": 5.0}
    assert timer.step_metrics() == {}
    assert timer.total_seconds() == {"total": 21.0, "rollout": 4.0, "train": 7.0}


def test_phase_that_raises_is_charged(clock):
    timer = PhaseTimer(torch.device("cpu"))

    def fail():
        with timer.phase("train"):
            clock.now += 2.0
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert timer.step_metrics() == {"time/train_seconds": 2.0}


def test_phase_is_announced_as_it_begins():
    names = []
    timer = PhaseTimer(torch.device("cpu"), on_enter=names.append)
    with timer.phase("rollout"):
        assert names == ["rollout"]


@pytest.mark.parametrize("synchronize", [True, False])
def test_gpu_is_waited_for_before_each_reading(monkeypatch, synchronize):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    timer = PhaseTimer(torch.device("cuda", 0), synchronize=synchronize)
    with timer.phase("train"):
        pass
    assert len(waits) == (2 if synchronize else 0)


def test_totals_go_on_from_an_earlier_process(clock):
    timer = PhaseTimer(torch.device("cpu"))
    timer.resume({"total": 30.0, "rollout": 20.0})
    with timer.phase("rollout"):
        clock.now += 5.0
    assert timer.total_seconds() == {"total": 35.0, "rollout": 25.0}
    assert timer.step_metrics() == {"time/rollout_seconds": 5.0}
