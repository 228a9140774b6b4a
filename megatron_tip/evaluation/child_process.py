"""Programs that an evaluation starts, and that end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_tip.errors import EvaluationError

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.2


def run_logged(command: list[str], log: Path) -> None:
    """Runs `command` with its output in `log`, in a session of its own. SIGTERM, SIGINT and SIGHUP of this process end
    it and all of its session.

    Raises:
        EvaluationError: it failed; with the last lines of the log. SystemExit: such a signal came.
    """
    with log.open("wb") as output, _end_signals() as caught:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and not caught:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_POLL_SECONDS)
        finally:
            end_session(process)
    if caught:
        raise SystemExit(128 + caught[0])
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        failure = f"{log}: the evaluation failed with exit code {process.returncode}: "
        raise EvaluationError(failure + " | ".join(last))


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session: first it is asked, then all of the session are killed."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _end_signals() -> Iterator[list[int]]:
    """Collects those that come meanwhile; nothing is interrupted, so that a child that was just started is known."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python's handlers are the main thread's
        yield caught
        return
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in _END_SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
