"""The folder of a run: created and checked before anything starts; every file is written atomically.

    config.toml  metrics.jsonl  samples.jsonl  summary.json  report.png  rollouts/  checkpoint/  hf/
    views/  wandb/  tensorboard/  trackers.json  trace/  trace.json  if [tracking] or [monitoring] asks for them
    checkpoints/  what an interrupted run continues from    skipped/  rollouts of steps that were not finite
    diagnostics/  the start's scores of the context bank, if [diagnostics] asks for them
    stacks/  the stacks of all ranks of a run that hung     eval.jsonl, eval/  results of `megatron-tip eval`

`summary.json` is written last: its presence says that the run finished.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tip.config import Config
from megatron_tip.config.io import dump_config
from megatron_tip.errors import ConfigError
from megatron_tip.files import atomic_write_text, finite_json


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with the student's answers before the first and after the last step."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class RunFolder:
    """Paths within a run's folder, and writers of its files. Only rank 0 writes."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """Creates the folder with its parents. Safe to call again; keeps what an unfinished run wrote.

        Raises:
            ConfigError: it holds a finished run, is not a directory, or is not writable.
        """
        folder = cls(path)
        folder.require_unfinished()
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as probe:
                probe.write(bytes(4096))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise ConfigError(
                f"run.folder: expected a writable folder, got {path}: {error.strerror}; free space or "
                "permit writing there, or give another one (run.folder=...)"
            ) from None
        return folder

    def require_unfinished(self) -> None:
        """Raises ConfigError if the folder holds a finished run, or cannot be looked at."""
        try:
            is_finished = self.summary.exists()
        except OSError as error:  # a name that is too long, a loop of links
            raise ConfigError(f"run.folder: expected a usable path, got {self.path!s:.200}: {error.strerror}") from None
        if is_finished:
            further = f"; to train its student further, set model.path={self.hf}, without model.drop_layers"
            raise ConfigError(
                f"run.folder: expected a new folder, got {self.path}, which holds a finished run; give another one "
                f"(run.folder=...) or move that run away{further if self.hf.is_dir() else ''}"
            )

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.png"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def views(self) -> Path:
        return self.path / "views"

    @property
    def trace(self) -> Path:
        return self.path / "trace"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def diagnostics(self) -> Path:
        return self.path / "diagnostics"

    @property
    def hf(self) -> Path:
        return self.path / "hf"

    def clear(self) -> None:
        """Removes what an unfinished run left, its checkpoints first, so that nothing looks complete halfway."""
        parts = (self.rollouts, self.skipped, self.stacks, self.trace, self.views, self.diagnostics)
        for folder in (self.checkpoints, *parts):
            shutil.rmtree(folder, ignore_errors=True)
        self.metrics.unlink(missing_ok=True)

    def remove_partial_files(self) -> None:
        """Removes what a killed process left half-written. Only for who holds the folder's lock."""
        for folder in (self.path, self.rollouts, self.skipped, self.views, self.diagnostics):
            for path in folder.glob(".*.partial"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def write_config(self, config: Config) -> None:
        atomic_write_text(self.config, dump_config(config))

    def write_samples(self, samples: Sequence[Sample]) -> None:
        lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
        atomic_write_text(self.samples, "".join(lines))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Marks the run as finished; call it last."""
        atomic_write_text(self.summary, json.dumps(finite_json(summary), indent=2, allow_nan=False) + "\n")
