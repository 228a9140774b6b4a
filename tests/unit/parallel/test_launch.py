"""Workers on this machine: their world, their failures, their end."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tip.errors import ConfigError
from megatron_tip.parallel import launch
from megatron_tip.parallel.launch import start_workers
from tests.helpers.processes import is_alive, wait_until

ROOT = Path(__file__).parents[3]
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from megatron_tip.errors import InputError
from megatron_tip.parallel.launch import run_worker

folder = Path({folder!r})
rank = int(os.environ["RANK"])

def work():
{body}

run_worker(work)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the lines of `body` in every one of two workers."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MASTER_PORT", raising=False)

    def start(body, num_workers=2, **options):
        return start_workers(worker_command(tmp_path, body), num_workers, **{"is_saved": lambda: True, **options})

    return start


def worker_command(folder, body):
    script = folder / "worker.py"
    script.write_text(WORKER.format(folder=str(folder), body="\n".join(f"    {line}" for line in body.splitlines())))
    return [sys.executable, str(script)]


def test_workers_share_a_world_and_the_threads(start, tmp_path):
    outcome = start(
        """
import torch
import torch.distributed as dist
from megatron_tip.parallel.distributed import destroy_distributed, init_distributed
worker = init_distributed(timeout_seconds=60)
total = torch.tensor([worker.rank + 1.0])
dist.all_reduce(total)
facts = [worker.rank, worker.world_size, worker.local_rank, str(worker.device), total.item(), torch.get_num_threads()]
(folder / f"{rank}.json").write_text(json.dumps(facts))
destroy_distributed()
""",
        threads=4,
    )
    assert (outcome.exit_code, outcome.message) == (0, "")
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert facts == [[0, 2, 0, "cpu", 3.0, 2], [1, 2, 1, "cpu", 3.0, 2]]


def test_our_own_error_is_told_alone_and_the_peer_is_ended(start, tmp_path, capfd):
    outcome = start(
        """
(folder / f"{rank}.pid").write_text(str(os.getpid()))
if rank == 1:
    while not (folder / "0.pid").exists():
        time.sleep(0.01)
    raise InputError("prompts.jsonl, line 3: expected an object: got nothing")
time.sleep(1000)
"""
    )
    assert outcome.exit_code == 2, "refused input"
    assert outcome.message == "prompts.jsonl, line 3: expected an object: got nothing"
    assert not is_alive(int((tmp_path / "0.pid").read_text()))
    assert capfd.readouterr().err == ""


def test_first_failure_is_told_and_not_what_follows_from_it(start):
    outcome = start(
        """
import torch
import torch.distributed as dist
from megatron_tip.parallel.distributed import init_distributed
init_distributed(timeout_seconds=60)
if rank == 1:
    raise RuntimeError("the first failure")
dist.all_reduce(torch.ones(1))
"""
    )
    assert outcome.exit_code == 1
    assert outcome.message.startswith("rank 1 failed\nTraceback")
    assert outcome.message.endswith("RuntimeError: the first failure")


def test_worker_ended_by_a_signal_is_told(start):
    outcome = start("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(1000)")
    assert (outcome.exit_code, outcome.message) == (
        1,
        "rank 1 was ended by SIGKILL; the system may have run out of memory",
    )


def test_port_in_use_is_named(start, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"MASTER_PORT={port}: .*in use.*unset MASTER_PORT"):
            start("")


def test_free_port_of_the_user_is_taken(start, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    monkeypatch.setenv("MASTER_PORT", port)
    assert start('(folder / "port").write_text(os.environ["MASTER_PORT"])', num_workers=1).exit_code == 0
    assert (tmp_path / "port").read_text() == port


def test_signal_handlers_are_as_before(start):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    start("pass", num_workers=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


LAUNCHER = """
import sys
from megatron_tip.parallel.launch import start_workers
outcome = start_workers({command!r}, 2, grace_seconds={grace_seconds}, is_saved=lambda: True)
print(outcome.exit_code, outcome.message)
"""
SAVES = """
from megatron_tip.parallel.stop import StopRequested, StopSignals
with StopSignals() as stop:
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    while not stop.received:
        time.sleep(0.01)
    (folder / f"{rank}.saving").write_text("")
    time.sleep(SECONDS)
    (folder / f"{rank}.saved").write_text("")
    raise StopRequested(stop.received)
"""


def started_launcher(tmp_path, body, grace_seconds, **streams):
    program = LAUNCHER.format(command=worker_command(tmp_path, body), grace_seconds=grace_seconds)
    launcher = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        **streams,
    )
    wait_until(lambda: all((tmp_path / f"{rank}.pid").exists() for rank in range(2)))
    return launcher


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_workers_save_before_they_are_ended(tmp_path, number):
    launcher = started_launcher(tmp_path, SAVES.replace("SECONDS", "0.5"), grace_seconds=60)
    launcher.send_signal(number)
    stdout, _ = launcher.communicate()
    assert stdout == (
        f"{128 + number} ended by {number.name}; all workers are ended; the run is saved, the same command continues "
        "it\n"
    )
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))


def test_workers_save_when_nobody_reads_what_the_command_says(tmp_path):
    """As with `2>&1 | tee log`: the Ctrl-C ends tee too."""
    reader, writer = os.pipe()
    launcher = started_launcher(tmp_path, SAVES.replace("SECONDS", "0.5"), grace_seconds=60, stderr=writer)
    os.close(writer)
    os.close(reader)
    launcher.send_signal(signal.SIGINT)
    stdout, _ = launcher.communicate()
    assert "the run is saved" in stdout
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))


@pytest.mark.parametrize(
    "exit_codes,expected",
    [
        ([0, 0], "; they had finished"),
        ([75, 0], "; the run is saved, the same command continues it"),
        ([-15, 0], "; the same command continues from the newest checkpoint"),
    ],
)
def test_what_ended_workers_left_is_said(exit_codes, expected):
    assert launch._what_is_left(exit_codes, lambda: True) == expected


@pytest.mark.parametrize("second_signal", [True, False], ids=["second_signal", "grace_over"])
def test_workers_that_do_not_end_are_killed(tmp_path, second_signal):
    launcher = started_launcher(tmp_path, SAVES.replace("SECONDS", "1000"), grace_seconds=1000 if second_signal else 1)
    launcher.send_signal(signal.SIGTERM)
    if second_signal:
        wait_until(lambda: all((tmp_path / f"{rank}.saving").exists() for rank in range(2)))
        launcher.send_signal(signal.SIGINT)
    stdout, _ = launcher.communicate()
    assert stdout == (
        "143 ended by SIGTERM; all workers are ended; they were killed before they had saved (a second signal, or "
        "fault.grace_seconds); the same command continues from the newest checkpoint\n"
    )
    assert not any(is_alive(int((tmp_path / f"{rank}.pid").read_text())) for rank in range(2))


def test_workers_that_were_told_to_stop_give_their_exit_code(start):
    outcome = start("from megatron_tip.parallel.stop import StopRequested\nraise StopRequested(signal.SIGUSR1)")
    assert (outcome.exit_code, outcome.message) == (
        75,
        "the workers were told to stop; the run is saved, the same command continues it",
    )


def test_workers_that_stopped_before_anything_was_saved_promise_no_more(start):
    body = "from megatron_tip.parallel.stop import StopRequested\nraise StopRequested(signal.SIGUSR1)"
    outcome = start(body, num_workers=1, is_saved=lambda: False)
    assert (
        outcome.message
        == "the workers were told to stop; no step is done yet, the same command starts it from the beginning"
    )


def test_an_error_from_another_thread_ends_the_worker_and_is_told(start):
    outcome = start(
        """
import threading
from megatron_tip.errors import HangError
from megatron_tip.parallel.launch import end_worker_with
threading.Thread(target=end_worker_with, args=(HangError("no step was finished"),)).start()
time.sleep(1000)
""",
        num_workers=1,
    )
    assert (outcome.exit_code, outcome.message) == (1, "no step was finished")


def test_workers_end_when_the_launcher_is_killed(tmp_path):
    command = worker_command(tmp_path, '(folder / f"{rank}.pid").write_text(str(os.getpid()))\ntime.sleep(1000)')
    program = f"from megatron_tip.parallel.launch import start_workers; start_workers({command!r}, 2)"
    launcher = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        files = [tmp_path / "0.pid", tmp_path / "1.pid"]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    finally:
        launcher.kill()
        launcher.wait()
    pids = [int(file.read_text()) for file in files]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_failure_is_told_although_its_worker_is_ended_over_its_clean_up(start):
    outcome = start(
        """
from megatron_tip.errors import EngineError
from megatron_tip.parallel.launch import failures_on_record
try:
    with failures_on_record():
        if rank == 0:
            raise EngineError("all servers are gone")
        while not (folder / "told").exists():
            time.sleep(0.01)
        failure = EngineError("all servers are gone")
        failure.met_on_rank = 0
        raise failure
finally:
    if rank == 0:
        (folder / "told").touch()
        time.sleep(1000)  # a tracker that uploads
"""
    )
    assert (outcome.exit_code, outcome.message) == (1, "all servers are gone")
