"""Stop signals: every rank receives them, and obeys between steps or during a rollout."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Stop signals: SLURM announces a time limit with SIGUSR1 (`--signal`), pre-empts with SIGTERM; SIGINT is Ctrl-C."""

STOPPED_EXIT_CODE = 75
"""Exit code of a worker that stopped on request after saving: EX_TEMPFAIL of sysexits.h, "try again"."""

_ONE_REQUEST_SECONDS = 1.0


class StopRequested(BaseException):
    """A request to stop the run. Like KeyboardInterrupt not an Exception, so that failure handlers let it pass."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopSignals:
    """A context manager, for the main thread, that remembers a request to stop.

    `received`: the signal's number, 0 before. A second signal ends the process at once with exit code 128 + n, even
    while the main thread waits in a collective. Signals within a second of the first count as the same request: both a
    launcher and a scheduler may pass it on.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._is_interruptible = False
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises StopRequested in the block when a signal arrives, or if one has arrived before."""
        self._is_interruptible = True
        try:
            if self.received:
                raise StopRequested(self.received)
            yield
        finally:
            self._is_interruptible = False

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        # The C handler writes to it at once; Python's handler runs only when the main thread is back in Python.
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._note(number)
        if self._is_interruptible:
            self._is_interruptible = False
            raise StopRequested(number)

    def _note(self, number: int) -> None:
        if not self.received:
            self._received_at = time.monotonic()
            self.received = number

    def _watch(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] not in STOP_SIGNALS:
                continue
            if self.received and time.monotonic() - self._received_at > _ONE_REQUEST_SECONDS:
                os._exit(128 + number[0])
            self._note(number[0])
        os.close(reader)
