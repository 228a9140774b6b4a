"""What a run writes down while it goes: metrics, progress, and the totals for its summary."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from megatron_tip.observability.metrics_file import MetricsWriter
from megatron_tip.observability.progress import ProgressDisplay
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_table import TokenTable
from megatron_tip.training.observers import RunObservers


@dataclass
class RecorderState:
    """What a checkpoint holds of the recorder: totals over the steps so far, equal on every rank.

    `step`: the last that was recorded. `tracker_ids`: by tracker, under which id this run goes on there.
    """

    step: int = 0
    num_valid: int = 0
    num_selected: int = 0
    num_model_tokens: int = 0
    num_model_tokens_uncut: int = 0
    saved_seconds: float = 0.0
    tracker_ids: dict[str, str] = field(default_factory=dict)


class RunRecorder:
    """Writes metrics and shows progress on rank 0; keeps the totals, `state`, on every rank. A context manager."""

    def __init__(
        self,
        folder: RunFolder,
        display: ProgressDisplay,
        observers: RunObservers,
        *,
        writes: bool,
        resumed: RecorderState | None = None,
    ) -> None:
        """`resumed`: what `state` held in the process that this one continues; metrics of later steps are cut off."""
        self.state = resumed or RecorderState()
        self._observers = observers
        self._metrics = MetricsWriter(folder.metrics, keep_until_step=resumed and resumed.step) if writes else None
        self._display = display
        self._stack = contextlib.ExitStack()

    def record(self, step: int, metrics: Mapping[str, float], view: TokenTable | None = None) -> None:
        """Takes the metrics of `step`; step 0 is what was measured before the first. Collective over the world."""
        metrics = self._observers.extended(step, metrics)
        state = self.state
        state.step = step
        state.num_valid += int(metrics.get("selection/num_valid", 0))
        state.num_selected += int(metrics.get("selection/num_selected", 0))
        state.num_model_tokens += int(metrics.get("train/num_model_tokens", 0))
        state.num_model_tokens_uncut += int(metrics.get("train/num_model_tokens_uncut", 0))
        state.saved_seconds += metrics.get("perf/saved_train_seconds", 0.0)
        if self._metrics:
            self._metrics.write(step, metrics)
        self._display.finish_step(step, metrics)
        self._observers.log(step, metrics, view)

    def __enter__(self) -> Self:
        if self._metrics:
            self._stack.enter_context(self._metrics)
        self._stack.enter_context(self._display)
        self._observers.start(self.state.tracker_ids)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
