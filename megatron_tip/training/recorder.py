"""What a run writes down while it goes: metrics, progress, and the totals for its summary."""

import contextlib
from collections.abc import Mapping
from typing import Self

from megatron_tip.observability.metrics import MetricsWriter
from megatron_tip.observability.progress import ProgressDisplay
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_view import TokenView
from megatron_tip.training.observers import RunObservers


class RunRecorder:
    """Writes metrics and shows progress on rank 0; keeps the totals on every rank. A context manager."""

    def __init__(self, folder: RunFolder, display: ProgressDisplay, observers: RunObservers, *, writes: bool) -> None:
        self.tracker_ids: dict[str, str] = {}
        self._observers = observers
        self.num_valid = 0
        self.num_selected = 0
        self._metrics = MetricsWriter(folder.metrics) if writes else None
        self._display = display
        self._stack = contextlib.ExitStack()

    def record(self, step: int, metrics: Mapping[str, float], view: TokenView | None = None) -> None:
        """Takes the metrics of `step`; step 0 is what was measured before the first. Collective over the world."""
        metrics = self._observers.extended(step, metrics)
        self.num_valid += int(metrics.get("selection/num_valid", 0))
        self.num_selected += int(metrics.get("selection/num_selected", 0))
        if self._metrics:
            self._metrics.write(step, metrics)
        self._display.finish_step(step, metrics)
        self._observers.log(step, metrics, view)

    def __enter__(self) -> Self:
        if self._metrics:
            self._stack.enter_context(self._metrics)
        self._stack.enter_context(self._display)
        self._observers.start(self.tracker_ids)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
