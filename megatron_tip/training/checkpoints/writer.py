"""Saving of a run between two steps, while it continues."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tip.conversion.background_save import ShardedSave
from megatron_tip.conversion.tensor_load import reason_of
from megatron_tip.errors import OutputError
from megatron_tip.parallel.collectives import agree_on_maxima, gather_json
from megatron_tip.parallel.stop import StopRequested, StopSignals
from megatron_tip.parallel.together import raise_together, run_on
from megatron_tip.training.checkpoints.files import (
    SHARDS_NAME,
    STATE_NAME,
    CheckpointFiles,
    synced_checksums,
    write_state,
)
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.checkpoints.resume import identity_of
from megatron_tip.training.checkpoints.student_state import sharded_state
from megatron_tip.training.recorder import RunRecorder
from megatron_tip.training.run import TrainingRun

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Pending:
    """A save whose shards a thread is writing.

    `checksums`: of this rank's files, once `thread` has ended. `failure`: why there are none.
    """

    step: int
    partial: Path
    save: ShardedSave
    checksums: dict[str, tuple[int, str]] = field(default_factory=dict)
    failure: str = ""

    def start(self) -> None:
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        self.save.write()
        own = (self.partial / SHARDS_NAME).glob(f"__{dist.get_rank()}_*")
        try:
            self.checksums = synced_checksums(self.partial, own)
        except OSError as error:  # raised by `finish` on all ranks: a manifest without these files would look complete
            self.failure = f"{type(error).__name__}: {error}"


class Checkpointer:
    """A checkpointer: decides between steps whether to save or stop. Every rank has one; all methods are collective.

    At most one save is in progress. It counts from the rename in `finish`; until then the previous one is the newest.
    """

    def __init__(
        self,
        run: TrainingRun,
        recorder: RunRecorder,
        files: CheckpointFiles,
        stop: StopSignals,
        *,
        resumed_step: int = 0,
    ) -> None:
        """Takes the step of the checkpoint that the run resumes from, which is not written again."""
        self._run = run
        self._recorder = recorder
        self._files = files
        self._stop = stop
        self._settings = run.config.checkpoint
        self._writes = dist.get_rank() == 0
        self._pending: _Pending | None = None
        self._saved_step = resumed_step
        self._saved_at = time.monotonic()

    def heed_stop(self) -> None:
        """Raises StopRequested on all ranks if any of them was told to stop. 1 small all-reduce."""
        (stop,) = agree_on_maxima([self._stop.received])
        if stop:
            raise StopRequested(stop)

    def between_steps(self, progress: RunProgress) -> None:
        """Finishes a save that has been written, and begins one if it is due. 1 small all-reduce.

        Raises:
            StopRequested: on all ranks, if any of them was told to stop.
            OutputError: on all ranks; a save failed.
        """
        minutes = (time.monotonic() - self._saved_at) / 60
        is_late = self._writes and 0 < self._settings.every_minutes <= minutes
        is_writing = self._pending is not None and self._pending.thread.is_alive()
        stop, is_late, is_writing = agree_on_maxima([self._stop.received, is_late, is_writing])
        if not is_writing:
            self.finish()
        if stop:
            raise StopRequested(stop)
        every = self._settings.every_steps
        if progress.step and (is_late or (every and progress.step % every == 0)):
            self.save(progress)
            if not self._settings.in_background:
                self.finish()

    def save(self, progress: RunProgress) -> None:
        """Begins to save `progress`, unless its step is saved or no step is done yet; `finish` completes it.

        One checkpoint per step suffices, whether or not the step's metrics are recorded.
        """
        if progress.step == self._saved_step:
            return
        self.finish()
        with self._run.timer.phase("save"):
            partial = Path(self._on_writer(lambda: str(self._files.begin(progress.step))))
            save = ShardedSave(
                sharded_state(self._run.student, self._run.teacher),
                partial / SHARDS_NAME,
                copies=self._settings.in_background,
                sharers=self._run.student.groups.dp_cp_group,
            )
            values = {
                "progress": progress.as_json(),
                "adaptive_ratio": (ratio := self._run.last_step.adaptive_ratio) and asdict(ratio),
                "recorder": asdict(self._recorder.state),
                "seconds": self._run.timer.total_seconds(),
                **identity_of(self._run),
            }
            self._on_writer(lambda: write_state(partial, values))
            self._pending = _Pending(progress.step, partial, save)
            self._pending.start()
        self._saved_step = progress.step
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Waits for the save in progress, if any, and makes it the newest checkpoint.

        Raises:
            OutputError: on all ranks; it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._run.timer.phase("save"):
            pending.thread.join()
            try:
                pending.save.finish()
            except (CheckpointException, OSError) as error:
                raise _not_written(pending, reason_of(error)) from error
            failure = _not_written(pending, pending.failure) if pending.failure else None
            raise_together(failure, device=self._run.device)
            checksums = {}
            for part in gather_json(pending.checksums, device=self._run.device):
                checksums |= part
            self._on_writer(lambda: self._commit(pending, checksums))

    def _commit(self, pending: _Pending, checksums: dict[str, Any]) -> None:
        shards = pending.partial / SHARDS_NAME
        own = [pending.partial / STATE_NAME, *(shards / name for name in (".metadata", "metadata.json", "common.pt"))]
        checksums |= synced_checksums(pending.partial, own)
        self._files.commit(pending.step, pending.partial, checksums)
        try:
            self._files.prune(keep_last=self._settings.keep_last, keep_every_steps=self._settings.keep_every_steps)
        except OSError as error:  # one checkpoint too many is no reason to end a run
            logger.warning("an old checkpoint could not be removed: %s", error)

    def _on_writer(self, write: Callable[[], T]) -> T:
        """Returns, on every rank, what `write` does on rank 0; raises its OSError as OutputError, on every rank."""

        def act() -> T:
            try:
                return write()
            except OSError as error:
                raise OutputError(str(error)) from error

        return run_on(0, act, device=self._run.device)


def _not_written(pending: _Pending, reason: str) -> OutputError:
    return OutputError(
        f"{pending.partial}: cannot be written: {reason}; free space, and the same command continues from the "
        "checkpoint before"
    )
