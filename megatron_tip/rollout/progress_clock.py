"""The progress of a batch while an engine generates it: responses, tokens, tokens per second."""

import threading
import time
from collections.abc import Callable, Hashable

Show = Callable[[str], None]
"""What shows a batch's progress, in words."""


def show_nothing(text: str) -> None:
    """Shows nothing."""


class ProgressClock:
    """A clock that shows a batch's progress now and then. Any thread may call `note`."""

    def __init__(self, num_responses: int, show: Show, *, every_seconds: float = 1.0) -> None:
        self._num_responses = num_responses
        self._show = show
        self._every_seconds = every_seconds
        self._begin = self._last = time.monotonic()
        self._tokens: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    @property
    def is_due(self) -> bool:
        """Whether the next `note` will be shown; to count only then what is costly to count."""
        return time.monotonic() - self._last >= self._every_seconds

    def note(self, part: Hashable, num_tokens: int, num_finished: int) -> None:
        """Records how many tokens a part of the batch has so far, and how many responses of the batch are finished."""
        with self._lock:
            self._tokens[part] = num_tokens
            if not self.is_due:
                return
            now = self._last = time.monotonic()
            total = sum(self._tokens.values())
            speed = total / max(now - self._begin, 1e-9)
        self._show(f"{num_finished} of {self._num_responses} responses, {total:,} tokens, {speed:,.0f} tokens/s")
