"""The recorder of a run: metrics, trackers, traces, totals and the progress display."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from megatron_tip.config import Config
from megatron_tip.errors import OutputError
from megatron_tip.observability.memory import PhaseMemory
from megatron_tip.observability.metrics_file import MetricsWriter, recorded_steps
from megatron_tip.observability.monitor import Monitor
from megatron_tip.observability.progress import ProgressDisplay
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_table import TokenTable
from megatron_tip.observability.trace import TraceWriter, join_traces
from megatron_tip.observability.trackers import Trackers, make_trackers
from megatron_tip.parallel.distributed import Worker
from megatron_tip.training.throughput import Throughput

logger = logging.getLogger(__name__)


@dataclass
class RecorderState:
    """The recorder's part of a checkpoint: totals over the steps so far, equal on every rank.

    `step`: the last recorded step. `tracker_ids`: the run's id at each tracker, by tracker name.
    """

    step: int = 0
    num_valid: int = 0
    num_selected: int = 0
    num_model_tokens: int = 0
    num_model_tokens_uncut: int = 0
    saved_seconds: float = 0.0
    tracker_ids: dict[str, str] = field(default_factory=dict)


class RunRecorder:
    """Recorder of each step's metrics and their totals. Every rank measures and keeps totals; rank 0 writes.

    Used as a context manager. Set `state` to a checkpoint's before entering; metrics of later steps are then cut from
    the file. The caller enters `display`.
    """

    def __init__(self, config: Config, folder: RunFolder, worker: Worker, throughput: Throughput) -> None:
        monitoring = config.monitoring
        self.state = RecorderState()
        self.display = ProgressDisplay(config.training.steps, enabled=worker.rank == 0)
        self._config = config
        self._folder = folder
        self._rank = worker.rank
        self._throughput = throughput
        self._memory = PhaseMemory(worker.device)
        self._monitor = Monitor(worker.device, monitoring.every_seconds) if monitoring.every_seconds else None
        self._trackers = make_trackers(config.tracking) if worker.rank == 0 else Trackers([])
        self._metrics: MetricsWriter | None = None
        self._trace: TraceWriter | None = None
        self._stack = contextlib.ExitStack()

    def phase_ended(self, name: str, start: float, seconds: float) -> None:
        """Records the end of a phase; see `PhaseTimer`."""
        self._memory.phase_ended(name)
        if self._trace:
            self._trace.phase(name, start, seconds)

    def record(self, step: int, metrics: Mapping[str, float], view: TokenTable | None = None) -> None:
        """Records the metrics of `step`; step 0 is the measurement before the first. Collective over the world.

        Raises:
            OutputError: metrics.jsonl cannot be written.
        """
        metrics = self._extended(step, metrics)
        state = self.state
        state.step = step
        state.num_valid += int(metrics.get("selection/num_valid", 0))
        state.num_selected += int(metrics.get("selection/num_selected", 0))
        state.num_model_tokens += int(metrics.get("train/num_model_tokens", 0))
        state.num_model_tokens_uncut += int(metrics.get("train/num_model_tokens_uncut", 0))
        state.saved_seconds += metrics.get("perf/saved_train_seconds", 0.0)
        if self._metrics:
            self._metrics.write(step, metrics)
        self.display.finish_step(step, metrics)
        self._trackers.log_metrics(step, metrics)
        if view is not None:
            self._trackers.log_view(step, view)

    def finish_run(self) -> None:
        """Passes the student to the trackers and joins the traces. Rank 0 only, after the run's last collective."""
        if self._folder.hf.exists():
            self._trackers.log_student(self._folder.hf)
        if self._trace:
            try:
                join_traces(self._folder.trace, self._folder.path / "trace.json")
            except OutputError as error:  # must not fail a finished run
                logger.warning("trace.json: %s", error)
        self._trackers.finish()

    def _extended(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns `metrics` with throughput, memory and monitoring added. Collective if the run is monitored."""
        if self._trace:
            self._trace.step(step)
        extended = {**metrics, **self._throughput.metrics(metrics), **self._memory.step_metrics()}
        if self._monitor:
            extended |= self._monitor.step_metrics()
        return extended

    def __enter__(self) -> Self:
        if self._rank == 0:
            self._metrics = MetricsWriter(self._folder.metrics, keep_until_step=self.state.step)
            self._stack.enter_context(self._metrics)
        if self._monitor:
            self._stack.enter_context(self._monitor)
        if self._config.monitoring.trace:
            self._trace = TraceWriter(self._folder.trace, self._rank)
            self._stack.callback(self._trace.close)
        self._trackers.start(self._config, self._folder, self.state.tracker_ids)
        if self._rank == 0:
            self._trackers.fill_gaps(recorded_steps(self._folder.metrics))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is not None:  # a successful run did so in `finish_run`
            self._trackers.finish(failed=issubclass(kind, Exception))
