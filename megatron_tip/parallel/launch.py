"""Launch of a run's workers on this machine, and of the work inside each of them.

The workers are started through torch's own launcher, each in its own session: Ctrl-C reaches only this process, and
ending a worker ends whatever it started. torch is imported late, so that a wrong configuration is refused first.
"""

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
_BEGINS_ANEW = "no step is done yet, the same command starts it from the beginning"
_CONTINUES_BEFORE = "the same command continues from the newest checkpoint"
_BEGINS_BEFORE = "there is no checkpoint, the same command starts from the beginning"


@dataclass(frozen=True)
class Outcome:
    """The end of a run: the command's exit code, and a message for the user; empty after a success."""

    exit_code: int
    message: str = ""


def start_workers(
    command: Sequence[str],
    num_workers: int,
    *,
    threads: int = 0,
    grace_seconds: float = _SECONDS_TO_END,
    is_saved: Callable[[], bool] | None = None,
) -> Outcome:
    """Runs `command` in `num_workers` processes on this machine and returns when all have ended.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as under torchrun, over loopback. When one
    fails, the others are ended, and the outcome has only its message. SIGINT, SIGTERM, SIGUSR1, SIGHUP and SIGQUIT end
    all: the workers get SIGTERM and time to save; a second signal ends them at once.

    Args:
        threads: CPU threads of all workers together; 0: as many as this process may use.
        grace_seconds: until workers that got SIGTERM are killed.
        is_saved: called once workers have been ended; returns whether the same command can continue the run. None: they
            save nothing.

    Raises:
        ConfigError: MASTER_PORT is set and not free.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it reports each ended process
    listener = _listen(os.environ.get("MASTER_PORT", "0"))
    port = listener.getsockname()[1]
    # The store is here, not in rank 0, so that nobody can take the port between its choice and its use.
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
            name, told = interruption.sigval.name, f"{interruption.sigval.name}: the workers end"
            if is_saved is not None:
                told += f" and may save for {grace_seconds:g} s; a second signal ends them at once"
            exit_codes = _end(context, grace_seconds, told) if context is not None else []
            left = _what_is_left(exit_codes, is_saved) if is_saved is not None else ""
            return Outcome(128 + interruption.sigval, f"ended by {name}; all workers are ended{left}")
        assert result is not None, "a wait without a timeout returns a result"
        del store
        exit_codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        return _outcome_of(exit_codes, context.error_files, is_saved)


def run_worker(work: Callable[[], None], *, threads: int = 0, joins_servers: bool = False) -> None:
    """Runs `work` as one worker of a world that our launcher, torchrun or srun started.

    Sets the environment before `work` imports torch. If `work` fails, the process exits at once, as by
    `end_worker_with`, without destroying the process groups, so that its peers notice only after the error has been
    recorded. Our launcher shows the recorded error; under other launchers it goes to stderr. Exit code
    STOPPED_EXIT_CODE: `work` was stopped by a signal and has saved.

    Args:
        joins_servers: whether it shares an NCCL communicator with SGLang servers.
    """
    os.environ.update(worker_environment(os.environ, threads=threads, joins_servers=joins_servers))
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


def has_launcher() -> bool:
    """Returns whether our own launcher started this worker, and tells the user how the run ended."""
    return bool(os.environ.get(_LAUNCHER_PID))


def end_worker_with(error: Exception) -> None:
    """Records `error` as the reason for this worker's end and ends the process at once, from any thread.

    The exit code is 2 for errors in the user's input and 1 for all others.
    """
    _put_on_record(error)
    _leave(2 if errors.is_refusal(type(error)) else 1)


@contextmanager
def failures_on_record() -> Iterator[None]:
    """Records a failure of the block at once, before cleanup.

    Cleanup around the block may outlast this worker, which is ended as soon as a peer has failed because of it.
    """
    try:
        yield
    except Exception as error:
        _put_on_record(error)
        raise


def _put_on_record(error: Exception) -> None:
    """Records the error for our launcher; under others it goes to stderr. Does nothing the second time."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if vars(error).setdefault(_ON_RECORD, False):
        return
    vars(error)[_ON_RECORD] = True
    get_error_handler().record_exception(error)
    is_another_ranks = isinstance(error, MegatronTipError) and error.met_on_rank is not None  # which shows it itself
    if not has_launcher() and not is_another_ranks:
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
            "MASTER_PORT to have a free one chosen"
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
    # By default gloo looks up this machine's host name, which need not resolve, and listens to the network.
    defaults = {"TORCH_CPP_LOG_LEVEL": "ERROR", **({"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {})}
    return settings | {name: os.environ.get(name, value) for name, value in defaults.items()}


@contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    """Restores the signal handlers that torch's launcher replaces."""
    before = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_signal_exception(number: int, _: object) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException

    raise SignalException(f"process {os.getpid()} got signal {number}", signal.Signals(number))


def _end(context, grace_seconds: float, told: str) -> list[int | None]:
    """Terminates the workers, waits for the grace period, kills the rest; returns their exit codes.

    `told`: what the user is told as soon as they know.
    """
    later_signals: list[int] = []
    for number in _HANDLED:
        signal.signal(number, lambda number, _: later_signals.append(number))
    processes = [handler.proc for handler in context.subprocess_handlers.values()]
    for process in processes:
        process.terminate()  # only the worker: it needs its child processes until it has saved and closed its trackers
    with suppress(OSError):  # who read standard error may have ended by the same Ctrl-C
        sys.stderr.write(f"{told}\n")
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


def _what_is_left(exit_codes: Sequence[int | None], is_saved: Callable[[], bool]) -> str:
    """Returns what workers that a signal ended have left, and what the same command does then."""
    if exit_codes and not any(exit_codes):
        return "; they had finished"
    if STOPPED_EXIT_CODE in exit_codes:
        return f"; {_CONTINUES if is_saved() else _BEGINS_ANEW}"
    left = _CONTINUES_BEFORE if is_saved() else _BEGINS_BEFORE
    if -signal.SIGKILL in exit_codes:
        return f"; they were killed before they had saved (a second signal, or fault.grace_seconds); {left}"
    return f"; {left}"


def _outcome_of(
    exit_codes: Mapping[int, int], error_files: Mapping[int, str], is_saved: Callable[[], bool] | None
) -> Outcome:
    """Returns the outcome of workers that the launcher was not told to end. `exit_codes`: of the failed ones."""
    if not exit_codes:
        return Outcome(0)
    if STOPPED_EXIT_CODE in exit_codes.values():
        what_is_left = "" if is_saved is None else f"; {_CONTINUES if is_saved() else _BEGINS_ANEW}"
        return Outcome(STOPPED_EXIT_CODE, f"the workers were told to stop{what_is_left}")
    return _first_failure(exit_codes, error_files)


def _first_failure(exit_codes: Mapping[int, int], error_files: Mapping[int, str]) -> Outcome:
    """Returns the failure of the worker that caused it; its peers fail because it is gone. Exit code 2: refused input.

    Our own errors take precedence: a peer's failure never raises one. Next is a death by a signal that we did not send,
    which leaves no record; then the earliest record.
    """
    records = [(rank, record) for rank, path in error_files.items() if (record := _read_record(path))]
    records.sort(key=lambda item: item[1].time_ns)
    for _, record in records:
        if record.is_ours:
            return Outcome(2 if record.is_refusal else 1, record.message)
    for rank, code in exit_codes.items():
        if code < 0 and code != -signal.SIGTERM:
            name = signal.Signals(-code).name
            hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
            return Outcome(1, f"rank {rank} was ended by {name}{hint}")
    for rank, record in sorted(records, key=lambda item: item[1].is_of_a_peer):
        return Outcome(1, f"rank {rank} failed\n{record.traceback}")
    rank, code = next(iter(exit_codes.items()))
    return Outcome(1, f"rank {rank} ended with exit code {code}")


@dataclass(frozen=True)
class _ErrorRecord:
    time_ns: int
    is_ours: bool
    is_refusal: bool
    is_of_a_peer: bool
    message: str
    traceback: str


def _read_record(path: str) -> _ErrorRecord | None:
    """Returns the record that torch's error handler wrote; None without one, or if its writer was killed halfway."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)["message"]
        time_ns = os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        return None
    name, _, message = content["message"].partition(": ")
    found = getattr(errors, name, None)
    kind = found if isinstance(found, type) and issubclass(found, MegatronTipError) else Exception
    return _ErrorRecord(
        time_ns,
        is_ours=kind not in (Exception, errors.PeerError),
        is_refusal=errors.is_refusal(kind),
        is_of_a_peer=kind is errors.PeerError,
        message=message,
        traceback=content["extraInfo"]["py_callstack"].rstrip(),
    )


def _end_with_launcher(launcher_pid: int) -> None:
    """Ends this worker when its launcher has died without ending it (SIGKILL)."""
    while os.getppid() == launcher_pid:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
