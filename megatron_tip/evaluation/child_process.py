"""Child programs of an evaluation, which end with it."""

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
    """Runs `command` in its own session, with its output in `log`.

    SIGTERM, SIGINT and SIGHUP to this process end the whole session.

    Raises:
        EvaluationError: the command failed; with the last lines of the log. SystemExit: such a signal arrived.
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
    """Ends a process that leads a session: terminates it first, then kills the whole session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _end_signals() -> Iterator[list[int]]:
    """Collects the signals that arrive in the block, without interrupting it, so that no started child is lost."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers in the main thread only
        yield caught
        return
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in _END_SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
