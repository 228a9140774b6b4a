"""Starts a run's workers on this machine, and runs the work inside each of them.

The workers are started through torch's own launcher: each in a session of its own, so that Ctrl-C reaches this process
alone and ending a worker ends whatever it started. torch is imported late: a wrong configuration is refused before it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from megatron_tip import errors
from megatron_tip.errors import ConfigError, MegatronTipError
from megatron_tip.parallel.environment import thread_environment, worker_environment
from megatron_tip.parallel.stop import STOPPED_EXIT_CODE, StopRequested

_LAUNCHER_PID = "MEGATRON_TIP_LAUNCHER_PID"
_ON_RECORD = "_is_on_record"
_SECONDS_TO_END = 10
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
_CONTINUES = "the run is saved, the same command continues it"
_BEGINS_ANEW = "no step is done yet, the same command begins it anew"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the exit code of the command, and what to tell the user; empty after a success."""

    exit_code: int
    message: str = ""


def start_workers(
    command: Sequence[str],
    num_workers: int,
    *,
    threads: int = 0,
    grace_seconds: float = _SECONDS_TO_END,
    is_saved: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Runs `command` in `num_workers` processes on this machine and returns when all have ended.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as under torchrun, over loopback. When one
    fails the others are ended and its message alone is in the outcome. SIGINT, SIGTERM, SIGUSR1, SIGHUP and SIGQUIT end
    all: the workers get SIGTERM and time to save, a second signal ends them at once.

    Args:
        threads: CPU threads of all workers together; 0: as many as this process may use.
        grace_seconds: until workers that were told to end are killed.
        is_saved: asked once workers have stopped as told: whether there is anything that the same command continues.

    Raises:
        ConfigError: MASTER_PORT is set and not free.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it reports each ended process
    listener = _listen(os.environ.get("MASTER_PORT", "0"))
    port = listener.getsockname()[1]
    # The store lives here and not in rank 0: no port is given away between choosing and using it.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    shared = _shared_environment(num_workers, threads, port)
    ranks = range(num_workers)
    context = None
    with tempfile.TemporaryDirectory(prefix="megatron_tip_") as folder, _signal_handlers_restored():
        try:
            signal.signal(signal.SIGUSR1, _raise_signal_exception)
            context = start_processes(
                name="megatron-tip",
                entrypoint=command[0],
                args=dict.fromkeys(ranks, tuple(command[1:])),
                envs={rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            result = context.wait(period=0.1)
        except SignalException as interruption:
            exit_codes = _end(context, grace_seconds) if context is not None else []
            message = f"ended by {interruption.sigval.name}; all workers are ended"
            if STOPPED_EXIT_CODE in exit_codes:
                message += f"; {_CONTINUES if is_saved() else _BEGINS_ANEW}"
            return Outcome(128 + interruption.sigval, message)
        assert result is not None, "a wait without a timeout returns a result"
        del store
        exit_codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        return _outcome_of(exit_codes, context.error_files, is_saved)


def run_worker(work: Callable[[], None], *, threads: int = 0) -> None:
    """Runs `work` as one worker of a world that our launcher, torchrun or srun started.

    Sets the environment before `work` imports torch. If `work` fails the process ends at once with exit code 1, with
    no farewell to the process groups: its peers learn of it only after the error has been put on record. Started by
    our launcher, the launcher shows the error; elsewhere it goes to stderr. Exit code STOPPED_EXIT_CODE: `work` was
    stopped by a signal and has saved.
    """
    os.environ.update(worker_environment(os.environ, threads=threads))
    launcher_pid = os.environ.get(_LAUNCHER_PID)
    if launcher_pid:
        threading.Thread(target=_end_with_launcher, args=(int(launcher_pid),), daemon=True).start()
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().initialize()
    try:
        work()
    except StopRequested:
        _leave(STOPPED_EXIT_CODE)
    except Exception as error:
        end_worker_with(error)


def end_worker_with(error: Exception) -> None:
    """Puts `error` on record as this worker's end and ends the process at once, from any thread."""
    _put_on_record(error)
    _leave(1)


@contextmanager
def failures_on_record() -> Iterator[None]:
    """Puts a failure of the block on record at once: what is closed around it may take longer than this worker lives,
    which is ended as soon as a peer has failed over it.
    """
    try:
        yield
    except Exception as error:
        _put_on_record(error)
        raise


def _put_on_record(error: Exception) -> None:
    """Our launcher reads the record; elsewhere the error goes to stderr. Does nothing the second time."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if vars(error).setdefault(_ON_RECORD, False):
        return
    vars(error)[_ON_RECORD] = True
    get_error_handler().record_exception(error)
    is_another_ranks = hasattr(error, "met_on_rank")  # which shows it itself: see `together`
    if not os.environ.get(_LAUNCHER_PID) and not is_another_ranks:
        _report(error)


def _leave(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _report(error: Exception) -> None:
    if isinstance(error, MegatronTipError):
        sys.stderr.write(f"rank {os.environ['RANK']}: error: {error}\n")
    else:
        logging.getLogger(__name__).error("rank %s failed", os.environ["RANK"], exc_info=error)


def _listen(port: str) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", int(port)))
    except (OSError, ValueError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"MASTER_PORT={port}: expected a free port on this machine: {reason}; set another one, or unset "
            "MASTER_PORT and a free one is chosen"
        ) from None
    listener.listen()
    return listener


def _shared_environment(num_workers: int, threads: int, port: int) -> dict[str, str]:
    settings = {
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        _LAUNCHER_PID: str(os.getpid()),
        **thread_environment(threads, num_workers, os.environ),
    }
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    # Left alone, gloo looks up this machine's host name, which need not resolve, and listens to the network.
    defaults = {"TORCH_CPP_LOG_LEVEL": "ERROR", **({"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {})}
    return settings | {name: os.environ.get(name, value) for name, value in defaults.items()}


@contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    """torch's launcher puts its own handlers in place and leaves them there."""
    before = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_signal_exception(number: int, _: object) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException

    raise SignalException(f"process {os.getpid()} got signal {number}", signal.Signals(number))


def _end(context, grace_seconds: float) -> list[int | None]:
    """Tells the workers to end, waits for it as long as is due, kills who is left; returns their exit codes."""
    later_signals: list[int] = []
    for number in _HANDLED:
        signal.signal(number, lambda number, _: later_signals.append(number))
    processes = [handler.proc for handler in context.subprocess_handlers.values()]
    for process in processes:
        process.terminate()  # the worker alone: what it started serves it until it has saved, or closed its trackers
    deadline = time.monotonic() + grace_seconds
    while any(process.poll() is None for process in processes):
        if later_signals or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    context.close(signal.SIGKILL, timeout=_SECONDS_TO_END)
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return [process.poll() for process in processes]


def _outcome_of(exit_codes: Mapping[int, int], error_files: Mapping[int, str], is_saved: Callable[[], bool]) -> Outcome:
    """Of workers that nobody told the launcher to end. `exit_codes`: of those that failed."""
    if not exit_codes:
        return Outcome(0)
    if STOPPED_EXIT_CODE in exit_codes.values():
        what_is_left = _CONTINUES if is_saved() else _BEGINS_ANEW
        return Outcome(STOPPED_EXIT_CODE, f"the workers were told to stop; {what_is_left}")
    return Outcome(1, _first_failure(exit_codes, error_files))


def _first_failure(exit_codes: Mapping[int, int], error_files: Mapping[int, str]) -> str:
    """The message of the worker that failed on its own account; its peers fail after it, for want of it.

    Our own errors come first: a peer's failure never raises one. Then a death by a signal that was not ours, which
    leaves no record. Then the earliest record.
    """
    records = [(rank, record) for rank, path in error_files.items() if (record := _read_record(path))]
    records.sort(key=lambda item: item[1].time_ns)
    for _, record in records:
        if record.is_ours:
            return record.message
    for rank, code in exit_codes.items():
        if code < 0 and code != -signal.SIGTERM:
            name = signal.Signals(-code).name
            hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
            return f"rank {rank} was ended by {name}{hint}"
    for rank, record in sorted(records, key=lambda item: item[1].is_of_a_peer):
        return f"rank {rank} failed\n{record.traceback}"
    rank, code = next(iter(exit_codes.items()))
    return f"rank {rank} ended with exit code {code}"


@dataclass(frozen=True)
class _ErrorRecord:
    time_ns: int
    is_ours: bool
    is_of_a_peer: bool
    message: str
    traceback: str


def _read_record(path: str) -> _ErrorRecord | None:
    """The record that torch's error handler wrote; None if there is none, or its writer was ended over it."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)["message"]
        time_ns = os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        return None
    name, _, message = content["message"].partition(": ")
    is_of_a_peer = name == errors.PeerError.__name__
    return _ErrorRecord(
        time_ns,
        is_ours=hasattr(errors, name) and not is_of_a_peer,
        is_of_a_peer=is_of_a_peer,
        message=message,
        traceback=content["extraInfo"]["py_callstack"].rstrip(),
    )


def _end_with_launcher(launcher_pid: int) -> None:
    """Ends this worker when its launcher is gone without having ended it (SIGKILL)."""
    while os.getppid() == launcher_pid:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
