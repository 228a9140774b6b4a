"""A run's checkpoints on disk: written atomically, with a checksum of every file.

    checkpoints/step_000020/manifest.json   format, versions, every file's size and SHA-256; written last
                            state.json      step, totals, what was measured before the first step
                            shards/         megatron.core.dist_checkpointing: weights, optimizer, random states

A folder left by a crash has another name (`.step_000020.partial`) and is removed by the next run. Free of torch.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_tip.errors import CheckpointError
from megatron_tip.files import output_errors, parse_json, sync_path

FORMAT = "megatron_tip checkpoint 1"
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
STATE_SECTIONS = ("settings", "progress", "recorder")
"""The parts of a state that are objects themselves."""
SHARDS_NAME = "shards"

Checksums = Mapping[str, tuple[int, str]]
"""Size in bytes and SHA-256 by path within the checkpoint."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The `checkpoints/` folder of a run. Only rank 0 creates, renames and removes; every rank reads."""

    folder: Path

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in order; only `problem_with` finds damage."""
        names = [path.name for path in self.folder.glob("step_*")] if self.folder.is_dir() else []
        return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step_(\d+)", name)))

    def step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def begin(self, step: int) -> Path:
        """Creates an empty folder to write the checkpoint of `step` into; removes what a crash left of others."""
        partial = self.folder / f".step_{step:06d}.partial"
        with output_errors(partial):
            self.remove_partial()
            (partial / SHARDS_NAME).mkdir(parents=True)
        return partial

    def remove_partial(self) -> None:
        for path in self.folder.glob(".step_*.partial"):
            shutil.rmtree(path)

    def commit(self, step: int, partial: Path, checksums: Checksums) -> None:
        """Makes `partial` the checkpoint of `step`: manifest, sync, rename, sync.

        Raises:
            OutputError: it cannot be written; `step` then has no checkpoint.
        """
        manifest = {
            "format": FORMAT,
            "step": step,
            "versions": {name: version(name) for name in ("megatron_tip", "megatron_core", "torch")},
            "files": dict(sorted(checksums.items())),
        }
        target = self.step_folder(step)
        with output_errors(target):
            _write_synced(partial / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
            sync_path(partial / SHARDS_NAME)
            sync_path(partial)
            replaced = target.with_name(f".{target.name}.replaced.partial")
            if target.exists():  # renamed, not removed: removal takes time, during which neither would exist
                target.rename(replaced)
            partial.rename(target)
            sync_path(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)

    def prune(self, *, keep_last: int, keep_every_steps: int) -> None:
        """Removes all but the last `keep_last` and those at multiples of `keep_every_steps` (0: none)."""
        for step in self.steps()[:-keep_last]:
            if not keep_every_steps or step % keep_every_steps:
                doomed = self.folder / f".step_{step:06d}.partial"
                self.step_folder(step).rename(doomed)  # from now on it is not a checkpoint
                shutil.rmtree(doomed)

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it no longer counts but can be inspected; returns its new path."""
        target = self.folder / f"damaged_step_{step:06d}"
        if target.exists():
            shutil.rmtree(target)
        return self.step_folder(step).rename(target)

    def problem_with(self, step: int, *, part: int = 0, num_parts: int = 1) -> str | None:
        """Returns what is wrong with a step's checkpoint, or None. Reads every `num_parts`-th file from `part` on."""
        folder = self.step_folder(step)
        try:
            manifest = parse_json((folder / MANIFEST_NAME).read_bytes())
            if manifest["format"] != FORMAT:
                return f"{MANIFEST_NAME}: expected the format {FORMAT!r}, got {manifest['format']!r}"
            files = [(name, size, digest) for name, (size, digest) in manifest["files"].items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{MANIFEST_NAME}: missing or broken ({type(error).__name__})"
        for name, size, digest in files[part::num_parts]:
            try:
                got_size, got_digest = checksum(folder / name)
            except (OSError, ValueError) as error:  # the latter for a name that no file can have
                return f"{name}: {getattr(error, 'strerror', error)}"
            if got_size != size:
                return f"{name}: expected {size} bytes, got {got_size}"
            if got_digest != digest:
                return f"{name}: its checksum differs from the one when it was written"
        return None

    def read_state(self, step: int) -> dict[str, Any]:
        """Returns the state of a step's checkpoint; raises CheckpointError if it is damaged, or of another kind."""
        path = self.step_folder(step) / STATE_NAME
        try:
            state = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(state.get(name, {}), dict) for name in STATE_SECTIONS):
            raise CheckpointError(
                f"{path}: expected a run's state, in it objects for {', '.join(STATE_SECTIONS)}, got {state!r:.80}"
            )
        return state


def write_state(partial: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint's state.json. NaN, a missing measurement, stays NaN."""
    path = partial / STATE_NAME
    with output_errors(path):
        _write_synced(path, json.dumps(state).encode())


def synced_checksums(folder: Path, paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Syncs `paths` to disk; returns their checksums by path relative to `folder`."""
    return {str(path.relative_to(folder)): checksum(path, sync=True) for path in paths}


def checksum(path: Path, *, sync: bool = False) -> tuple[int, str]:
    """Returns the size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
