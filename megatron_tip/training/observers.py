"""What looks on while a run goes: monitoring, throughput, trackers, the time line."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, MutableMapping
from typing import Self

from megatron_tip.config import Config
from megatron_tip.errors import OutputError
from megatron_tip.observability.memory import PhaseMemory
from megatron_tip.observability.monitor import Monitor
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_table import TokenTable
from megatron_tip.observability.trace import TraceWriter, join_traces
from megatron_tip.observability.trackers import Trackers, make_trackers
from megatron_tip.parallel.distributed import Worker
from megatron_tip.planning.plan import RunPlan
from megatron_tip.training.throughput import Throughput, peak_tflops_of

logger = logging.getLogger(__name__)


class RunObservers:
    """Adds what they measure to a step's metrics, on every rank; tells the trackers, on rank 0. A context manager."""

    def __init__(self, config: Config, plan: RunPlan, folder: RunFolder, worker: Worker) -> None:
        monitoring = config.monitoring
        self._config = config
        self._folder = folder
        self._writes = worker.rank == 0
        self._throughput = Throughput(
            plan.student.architecture,
            plan.teacher.architecture if plan.teacher else None,
            worker.world_size,
            monitoring.peak_tflops or peak_tflops_of(worker.device),
        )
        self._monitor = Monitor(worker.device, monitoring.every_seconds) if monitoring.every_seconds else None
        self._memory = PhaseMemory(worker.device)
        self._rank = worker.rank
        self._trace: TraceWriter | None = None
        self._trackers = make_trackers(config.tracking) if self._writes else Trackers([])
        self._stack = contextlib.ExitStack()

    def start(self, tracker_ids: MutableMapping[str, str]) -> None:
        """Starts the trackers; those that this run had go on under their ids, and new ids are put there."""
        self._trackers.start(self._config, self._folder, tracker_ids)

    def on_phase(self, name: str, start: float, seconds: float) -> None:
        """Takes a phase that ended; see `PhaseTimer`."""
        self._memory.phase_ended(name)
        if self._trace:
            self._trace.phase(name, start, seconds)

    def extended(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics of `step` with throughput, memory and monitoring.

        Collective over the world with monitoring.
        """
        if self._trace:
            self._trace.step(step)
        extended = {**metrics, **self._throughput.metrics(metrics), **self._memory.step_metrics()}
        if self._monitor:
            extended |= self._monitor.step_metrics()
        return extended

    def log(self, step: int, metrics: Mapping[str, float], view: TokenTable | None) -> None:
        """Tells the trackers what was recorded."""
        self._trackers.log_metrics(step, metrics)
        if view is not None:
            self._trackers.log_view(step, view)

    def finish_run(self) -> None:
        """The student to the trackers, the time lines in one file. Rank 0, behind a collective that follows the end."""
        if self._folder.hf.exists():
            self._trackers.log_student(self._folder.hf)
        if self._trace:
            try:
                join_traces(self._folder.trace, self._folder.path / "trace.json")
            except OutputError as error:  # the run is done, and its time line no reason to say otherwise
                logger.warning("trace.json: %s", error)
        self._trackers.finish()

    def __enter__(self) -> Self:
        if self._monitor:
            self._stack.enter_context(self._monitor)
        if self._config.monitoring.trace:
            self._trace = TraceWriter(self._folder.trace, self._rank)
            self._stack.callback(self._trace.close)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is not None:  # after a success the exported student is still to come
            self._trackers.finish(failed=issubclass(kind, Exception))
