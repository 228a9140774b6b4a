"""A process that hangs writes its stacks and is ended; one that goes on is left alone."""

import threading
import time
from pathlib import Path

from megatron_tip.errors import HangError
from megatron_tip.parallel import watchdog
from megatron_tip.parallel.watchdog import HangWatchdog


def stand_still(ended: threading.Event) -> None:
    assert ended.wait(20), "nobody noticed"


def test_a_hang_is_told_with_the_stack(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(watchdog, "_OTHERS_SECONDS", 0.3)
    ended, told = threading.Event(), []

    def on_hang(error: HangError) -> None:
        told.append(str(error))
        ended.set()

    with HangWatchdog(tmp_path / "stacks", 3, timeout_seconds=0.3, on_hang=on_hang):
        stand_still(ended)
    assert told[0].startswith("no step was finished in 0.3 s (fault.step_timeout_seconds)")
    assert "in stand_still" in (tmp_path / "stacks" / "rank_00003.txt").read_text()


def test_steps_in_time_leave_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(watchdog, "_OTHERS_SECONDS", 0.1)
    told: list[HangError] = []
    with HangWatchdog(tmp_path / "stacks", 0, timeout_seconds=3.0, on_hang=told.append) as dog:
        for _ in range(3):
            time.sleep(1.2)
            dog.step_done()
    assert told == []
    assert not (tmp_path / "stacks").exists()


def test_no_timeout_no_watch(tmp_path: Path):
    with HangWatchdog(tmp_path / "stacks", 0, timeout_seconds=0.0, on_hang=lambda _: None) as dog:
        dog.step_done()
        assert not (tmp_path / "stacks").exists()
