"""A watchdog that ends a hanging run and writes the stacks of all ranks."""

import faulthandler
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from megatron_tip.errors import HangError

_OTHERS_SECONDS = 3.0


class HangWatchdog:
    """A context manager that expects `step_done` at least every `timeout_seconds`. Every rank has one.

    Otherwise the stacks of all threads are written to `folder`/rank_00000.txt, by faulthandler's C thread, so that this
    also works for a rank that is stuck in native code. A few seconds later, when the other ranks have done the same,
    `on_hang` receives a HangError and must end the process. `timeout_seconds` 0: no watchdog.
    """

    def __init__(
        self, folder: Path, rank: int, *, timeout_seconds: float, on_hang: Callable[[HangError], None]
    ) -> None:
        self._path = folder / f"rank_{rank:05d}.txt"
        self._timeout_seconds = timeout_seconds
        self._on_hang = on_hang
        self._ended = threading.Event()
        self._last = time.monotonic()

    def step_done(self) -> None:
        """Restarts the timeout."""
        self._last = time.monotonic()
        if self._timeout_seconds:
            faulthandler.dump_traceback_later(self._timeout_seconds, file=self._file)

    def __enter__(self) -> Self:
        if self._timeout_seconds:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
            threading.Thread(target=self._watch, daemon=True).start()
        self.step_done()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._timeout_seconds:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
                with suppress(OSError):  # it holds other ranks' files
                    self._path.parent.rmdir()

    def _watch(self) -> None:
        while (left := self._last + self._timeout_seconds + _OTHERS_SECONDS - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        self._on_hang(
            HangError(
                f"no step was finished in {self._timeout_seconds:g} s (fault.step_timeout_seconds): the stacks of all "
                f"ranks are in {self._path.parent}; the same command continues from the last checkpoint"
            )
        )
