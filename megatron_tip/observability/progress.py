"""Progress of the run: a bar and live lines on a terminal, else one log line per step and of long phases."""

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

logger = logging.getLogger(__name__)

_SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/reverse_kl": "reverse KL {:.4f}",
    "train/topk_reverse_kl": "top-K reverse KL {:.4f}",
    "heldout/reverse_kl": "held-out reverse KL {:.4f}",
    "heldout/topk_reverse_kl": "held-out top-K reverse KL {:.4f}",
    "heldout/task_accuracy": "right answers {:.0%}",
    "train/grad_norm": "gradient norm {:.3g}",
    "selection/retention_ratio": "selected {:.1%}",
    "rollout/response_tokens_mean": "response {:.0f} tokens",
}


_LOG_SECONDS = 30.0


class ProgressDisplay:
    """A context manager that shows a run's steps. Ranks other than 0 pass `enabled=False` and show nothing."""

    def __init__(self, num_steps: int, *, enabled: bool, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._num_steps = num_steps
        self._logs = enabled and not console.is_terminal
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),  # the line fits 80 columns
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._phase = ""
        self._task = self._bar.add_task("train", total=num_steps)
        self._now = Text(style="cyan")
        self._line = Text()
        self._first_step: int | None = None
        self._begin = self._last_log = time.monotonic()
        self._live = (
            Live(Group(self._bar, self._now, self._line), console=console) if enabled and console.is_terminal else None
        )

    def show_phase(self, name: str) -> None:
        """Shows the name of the current phase."""
        self._phase = self._now.plain = name

    def show_progress(self, text: str) -> None:
        """Shows how far the current phase is; where there is no terminal, twice a minute."""
        self._now.plain = f"{self._phase}: {text}"
        now = time.monotonic()
        if self._logs and now - self._last_log >= _LOG_SECONDS:
            self._last_log = now
            logger.info("%s: %s", self._phase, text)

    def finish_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves on to `step` and shows its main metrics; step 0 is the measurement before the first step."""
        line = describe_metrics(metrics)
        self._bar.update(self._task, completed=step)
        self._line.plain = line
        if self._logs:
            self._last_log = time.monotonic()
            logger.info("step %d/%d: %s%s", step, self._num_steps, line, self._times(step))

    def _times(self, step: int) -> str:
        """Returns the time since the first step that was shown, and an estimate of the time that is left."""
        if self._first_step is None:
            self._first_step, self._begin = step, time.monotonic()
        done = step - self._first_step
        if not done:
            return ""
        elapsed = time.monotonic() - self._begin
        left = elapsed / done * (self._num_steps - step)
        return f"; elapsed {timedelta(seconds=round(elapsed))}, left {timedelta(seconds=round(left))}"

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()


def describe_metrics(metrics: Mapping[str, float]) -> str:
    """Returns the main metrics in words, then the seconds of each phase."""
    parts = [text.format(metrics[name]) for name, text in _SHOWN.items() if name in metrics]
    seconds = {
        name.removeprefix("time/").removesuffix("_seconds"): value
        for name, value in metrics.items()
        if name.startswith("time/")
    }
    if seconds:
        phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
        parts.append(f"{sum(seconds.values()):.1f} s ({phases})")
    return ", ".join(parts)
