"""What a run writes down while it goes: metrics, progress, and the totals for its summary."""

import contextlib
from collections.abc import Mapping
from typing import Self

from megatron_tip.observability.metrics import MetricsWriter
from megatron_tip.observability.progress import ProgressDisplay
from megatron_tip.observability.run_folder import RunFolder


class RunRecorder:
    """Writes metrics and shows progress on rank 0; keeps the totals on every rank. A context manager."""

    def __init__(self, folder: RunFolder, display: ProgressDisplay, *, writes: bool) -> None:
        self.num_valid = 0
        self.num_selected = 0
        self.num_model_tokens = 0
        self.num_model_tokens_uncut = 0
        self.saved_seconds = 0.0
        self._metrics = MetricsWriter(folder.metrics) if writes else None
        self._display = display
        self._stack = contextlib.ExitStack()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of `step`; step 0 is what was measured before the first."""
        self.num_valid += int(metrics.get("selection/num_valid", 0))
        self.num_selected += int(metrics.get("selection/num_selected", 0))
        self.num_model_tokens += int(metrics.get("train/num_model_tokens", 0))
        self.num_model_tokens_uncut += int(metrics.get("train/num_model_tokens_uncut", 0))
        self.saved_seconds += metrics.get("train/saved_seconds", 0.0)
        if self._metrics:
            self._metrics.write(step, metrics)
        self._display.finish_step(step, metrics)

    def __enter__(self) -> Self:
        if self._metrics:
            self._stack.enter_context(self._metrics)
        self._stack.enter_context(self._display)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
