"""Trackers, which take a run's metrics besides its own files, and the isolation of training from their failures."""

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from megatron_tip.config import Config, TrackingConfig
from megatron_tip.errors import OptionalDependencyError, OutputError
from megatron_tip.files import atomic_write_bytes, atomic_write_text, parse_json
from megatron_tip.observability.metrics_file import RecordedStep
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_table import TokenTable, encode_token_table, token_table_file
from megatron_tip.observability.token_view import page_html, quadrant_png
from megatron_tip.parallel.environment import is_restarted

logger = logging.getLogger(__name__)

IDENTITIES_NAME = "trackers.json"
MAX_FAILURES = 3
"""Consecutive failures after which a tracker is no longer used."""


class Tracker(Protocol):
    """A destination of a run's metrics. Each method may raise anything and may be slow, but must return."""

    name: str

    def start(self, config: Config, folder: RunFolder, identity: str | None) -> str | None:
        """Starts, or continues under `identity`; returns the identity under which a continued run should continue."""
        ...

    def fill_gaps(self, steps: Sequence[RecordedStep]) -> None:
        """Logs those of `steps` that the tracker's own record lost when an earlier start of the run was killed.

        Args:
            steps: all that metrics.jsonl has, in order; the run continues after the last.
        """
        ...

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_view(self, step: int, view: TokenTable) -> None: ...

    def log_student(self, path: Path) -> None:
        """Stores the exported student, a Hugging Face directory."""
        ...

    def finish(self, *, failed: bool) -> None: ...


class FolderTracker:
    """views/ in the run's folder: a page, a picture and a table per view. metrics.jsonl already has the metrics."""

    name = "views"

    def start(self, config: Config, folder: RunFolder, identity: str | None) -> str | None:
        self._folder = folder.views

    def fill_gaps(self, steps: Sequence[RecordedStep]) -> None:
        pass

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def log_view(self, step: int, view: TokenTable) -> None:
        self._folder.mkdir(exist_ok=True)
        atomic_write_text(self._folder / f"step_{step:06d}.html", page_html(view, f"step {step}"))
        if picture := quadrant_png(view):
            atomic_write_bytes(self._folder / f"step_{step:06d}.png", picture)
        atomic_write_bytes(token_table_file(self._folder, step), encode_token_table(view))

    def log_student(self, path: Path) -> None:
        pass

    def finish(self, *, failed: bool) -> None:
        pass


class Trackers:
    """All trackers of a run, in the first process. No method raises: failures are logged, and after three in a row a
    tracker is no longer used.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._failures = dict.fromkeys(trackers, 0)

    def start(self, config: Config, folder: RunFolder, identities: MutableMapping[str, str]) -> None:
        """Starts all trackers and drops those that fail; reads and updates `identities`, by tracker name.

        Identities come from the checkpoint. A job restarted before its first checkpoint finds them in the run's folder.
        """
        path = folder.path / IDENTITIES_NAME
        if not identities and is_restarted(os.environ):
            with suppress(OSError, ValueError):  # there are none, or they are lost
                if isinstance(known := parse_json(path.read_bytes()), dict):
                    identities.update({name: str(identity) for name, identity in known.items()})
        for tracker in list(self._failures):

            def start(tracker: Tracker = tracker) -> None:
                identity = tracker.start(config, folder, identities.get(tracker.name))
                if identity:
                    identities[tracker.name] = identity

            if not self._attempt(tracker, "start", start):
                del self._failures[tracker]
        if identities:
            with suppress(OutputError):  # the checkpoint will hold them
                atomic_write_text(path, json.dumps(dict(identities)))

    def fill_gaps(self, steps: Sequence[RecordedStep]) -> None:
        """Logs what the trackers' own records lost of `steps`, those that metrics.jsonl has; call it after `start`."""
        self._each("gaps", lambda tracker: tracker.fill_gaps(steps))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each("metrics", lambda tracker: tracker.log_metrics(step, metrics))

    def log_view(self, step: int, view: TokenTable) -> None:
        self._each("view", lambda tracker: tracker.log_view(step, view))

    def log_student(self, path: Path) -> None:
        self._each("student", lambda tracker: tracker.log_student(path))

    def finish(self, *, failed: bool = False) -> None:
        self._each("finish", lambda tracker: tracker.finish(failed=failed))
        self._failures.clear()

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._failures):
            self._attempt(tracker, what, lambda tracker=tracker: call(tracker))

    def _attempt(self, tracker: Tracker, what: str, call: Callable[[], None]) -> bool:
        if self._failures[tracker] >= MAX_FAILURES:
            return False
        try:
            call()
        except Exception as error:
            self._failures[tracker] += 1
            last = "; it is no longer used" if self._failures[tracker] == MAX_FAILURES else ""
            logger.warning("tracker %s, %s: %s: %s%s", tracker.name, what, type(error).__name__, error, last)
            return False
        self._failures[tracker] = 0
        return True


def check_trackers(settings: TrackingConfig) -> None:
    """Raises OptionalDependencyError for a tracker whose package is not installed; the same on all ranks."""
    needed = {"wandb": settings.wandb != "disabled", "tensorboardX": settings.tensorboard}
    for package, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            key = "tracking.wandb" if package == "wandb" else "tracking.tensorboard"
            raise OptionalDependencyError(
                f"{key}: expected the package {package}, which is not installed; "
                'pip install "megatron_tip[tracking]", or turn the tracker off'
            )


def make_trackers(settings: TrackingConfig) -> Trackers:
    """Returns the configured trackers, not yet started."""
    trackers: list[Tracker] = [FolderTracker()] if settings.view_every_steps else []
    if settings.wandb != "disabled":
        from megatron_tip.observability.wandb_tracker import WandbTracker

        trackers.append(WandbTracker())
    if settings.tensorboard:
        from megatron_tip.observability.tensorboard_tracker import TensorBoardTracker

        trackers.append(TensorBoardTracker())
    return Trackers(trackers)
