"""Signals: remembered, raised where that is allowed, obeyed at once the second time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tip.parallel.stop import StopRequested, StopSignals

ROOT = Path(__file__).parents[3]


def test_a_signal_is_remembered_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


def told_to_stop(stop: StopSignals) -> None:
    with stop.interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            raise AssertionError("taken for a failure") from None
        raise AssertionError("went on behind the signal")


def test_a_signal_interrupts_only_where_it_may():
    with StopSignals() as stop:
        with pytest.raises(StopRequested, match="SIGTERM") as caught:
            told_to_stop(stop)
        assert caught.value.signal_number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # no longer


def test_a_signal_that_came_before_interrupts_on_entry():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested), stop.interruptible():
            raise AssertionError("entered")


STUCK = """
import os, sys, threading
from megatron_tip.parallel.stop import StopSignals
with StopSignals():
    print("ready", flush=True)
    sys.stdin.buffer.raw.read(1)  # returns to no Python code before it is told to
    threading.Lock().acquire()
    lock = threading.Lock(); lock.acquire(); lock.acquire()
"""


def stuck_process() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=-1, stdout=-1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_the_second_signal_leaves_at_once_wherever_the_main_thread_is():
    process = stuck_process()
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


def test_two_senders_of_one_request_are_no_second_signal():
    process = stuck_process()
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.8)
    process.kill()
    process.wait()
