"""Samples of a step become one value a figure."""

import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_tip.observability.monitor import Monitor, in_step, reduce_figures
from tests.helpers.distributed import run_workers


def test_samples_of_a_step_become_maxima_and_means():
    samples = [
        {"memory_used_bytes": 10.0, "cpu_percent": 20.0, "memory_available_bytes": 7.0, "throttled": 0.0},
        {"memory_used_bytes": 30.0, "cpu_percent": 60.0, "memory_available_bytes": 5.0, "throttled": 1.0},
        {"memory_used_bytes": 20.0, "cpu_percent": 40.0, "memory_available_bytes": 9.0},
    ]
    assert in_step(samples) == {
        "gpu/memory_used_max_bytes": 30.0,
        "gpu/throttled_ranks": 1.0,
        "host/cpu_mean_percent": 40.0,
        "host/memory_available_min_bytes": -5.0,  # its sign is turned back when the workers' values are one
    }


def _reduce_on_two_ranks() -> None:
    mine = [{"memory_used_bytes": 10.0, "power_watts": 300.0, "cpu_percent": 10.0, "memory_available_bytes": 6.0}]
    other = [{"memory_used_bytes": 30.0, "cpu_percent": 30.0, "memory_available_bytes": 4.0}]
    reduced = reduce_figures(in_step(other if dist.get_rank() else mine), torch.device("cpu"))
    assert reduced == {
        "gpu/memory_used_max_bytes": 30.0,
        "gpu/power_total_watts": 300.0,
        "host/cpu_mean_percent": 20.0,
        "host/memory_available_min_bytes": 4.0,
    }
    with Monitor(torch.device("cpu"), every_seconds=0.01) as monitor:
        time.sleep(0.1)
        metrics = monitor.step_metrics()
        at_once = monitor.step_metrics()  # sooner than a sample: one is taken
    assert metrics.keys() == at_once.keys()
    assert metrics.keys() == {"host/cpu_mean_percent", "host/rss_total_bytes", "host/memory_available_min_bytes"}
    assert metrics["host/rss_total_bytes"] > 200e6  # two Python processes with torch


def test_figures_of_the_workers_become_one_and_a_host_without_gpu_tells_of_itself_alone(tmp_path: Path):
    run_workers(_reduce_on_two_ranks, 2, tmp_path)


def test_a_sensor_that_fails_is_left_out_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken() -> None:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    with Monitor(torch.device("cpu"), every_seconds=0.01) as monitor:
        time.sleep(0.05)
        assert monitor.sample() == {}
    assert caplog.text.count("monitoring: left out from now on: AccessDenied") == 1
