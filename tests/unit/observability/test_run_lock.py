"""The lock on a run's folder: one holder, whose death frees it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_tip.errors import ConfigError, OutputError
from megatron_tip.observability.run_lock import LOCK_NAME, RunLock

HOLDS_IT = """
import sys, time
from pathlib import Path
from megatron_tip.observability.run_lock import RunLock
lock = RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_IT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"SLURM_JOB_ID": "77", "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path: Path, holder: subprocess.Popen) -> None:
    told = f"run.folder: expected a folder that no other run writes into.*process {holder.pid} of SLURM job 77 on "
    for _ in range(2):  # the refused process leaves the holder's lock and its words alone
        with pytest.raises(ConfigError, match=told):
            RunLock(tmp_path).acquire()


def test_a_killed_process_holds_nothing(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.kill()
    holder.wait()
    lock = RunLock(tmp_path).acquire()
    assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_NAME).read_text()
    lock.release()
    RunLock(tmp_path).acquire().release()


def test_a_requeued_job_waits_for_the_old_one_to_be_gone(tmp_path: Path, holder: subprocess.Popen) -> None:
    threading.Timer(1.0, holder.kill).start()
    start = time.monotonic()
    RunLock(tmp_path).acquire(wait_seconds=30.0).release()
    assert 0.5 < time.monotonic() - start < 25.0


def test_a_lock_without_words_is_still_a_lock(tmp_path: Path, holder: subprocess.Popen) -> None:
    (tmp_path / LOCK_NAME).write_text("{")
    with pytest.raises(ConfigError, match="which another process is using"):
        RunLock(tmp_path).acquire()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        RunLock(tmp_path / "gone").acquire()
