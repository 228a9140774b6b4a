"""Atomic writing of files and folders: written next to their place, synced, renamed."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_tip.errors import OutputError


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text from a file that anyone may have written.

    Raises:
        ValueError: it is not JSON, or nests deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether a file is a pointer that Git LFS leaves in the place of a file that it has not fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def finite_json(value: Any) -> Any:
    """Returns `value` with None in place of floats that are not finite: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {name: finite_json(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite_number(value: Any) -> float | None:
    """Returns a number of a JSON file as a float; None for what is no number, or none that float32 can hold.

    Sums and differences of such numbers stay finite.
    """
    is_number = isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST
    return float(value) if is_number else None


_LARGEST = 3.4e38


def atomic_write_text(path: Path, text: str, *, setting: str = "run.folder", mode: int = 0o666) -> None:
    """Writes UTF-8 `text` to `path`; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode(), setting=setting, mode=mode)


def atomic_write_bytes(path: Path, content: bytes, *, setting: str = "run.folder", mode: int = 0o666) -> None:
    """Writes `content` beside `path`, syncs and renames it: readers of `path` find the old or the new content whole.

    Args:
        setting: the setting that gave `path`, for errors.
        mode: the permissions of the file, which the umask reduces.

    Raises:
        OutputError: the disk is full, or the folder is not writable; `path` is unchanged.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with output_errors(path, setting=setting):
        try:
            beside.unlink(missing_ok=True)  # its mode would stay
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def output_errors(path: Path, *, setting: str = "run.folder") -> Iterator[None]:
    """Turns an OSError from writing to `path` into an OutputError that advises another `setting`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror}; free space, or give another {setting}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path`, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_new(target: Path) -> None:
    """Raises OutputError if the folder exists."""
    if target.exists():
        raise OutputError(f"{target}: expected a new folder, but it exists; give another one or move it away")


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a folder beside `target` to write into; it becomes `target` after the block, or is removed if that fails.

    Raises:
        OutputError: the folder cannot be created or moved, the block fails to write, or `target` exists and `overwrite`
            is not set.
    """
    partial, replaced = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "replaced"))
    if not overwrite:
        require_new(target)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync_path(path)
        _put_in_place(partial, target, replaced)
        sync_path(target.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error}; free space, or give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, target: Path, replaced: Path) -> None:
    """Renames `partial` to `target`; removes an earlier folder once the new one is in place."""
    if not target.exists():
        partial.rename(target)
        return
    shutil.rmtree(replaced, ignore_errors=True)
    target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def sync_path(path: Path) -> None:
    """Brings a file's content or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
