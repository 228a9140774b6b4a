"""Folders that hold a model: what they say about it, and how new ones come into being whole or not at all."""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_tip.conversion.architecture import ModelArchitecture, config_without_layers
from megatron_tip.errors import OutputError, WeightsError


class ModelFolder:
    """A folder with a model's config.json and tokenizer, seen as if the dropped layers had never been in the model.

    `architecture` and `config` (the content of config.json) describe the model that is left.
    """

    def __init__(self, folder: str | Path, drop_layers: Collection[int] = ()) -> None:
        """Reads `folder`; `drop_layers` are counted in the folder's model.

        Raises:
            WeightsError: there is no readable config.json, or its architecture is not supported.
        """
        self.folder = Path(folder)
        config = read_json(self.folder / "config.json")
        self._full_architecture = ModelArchitecture.from_config(config, str(self.folder / "config.json"))
        self.architecture = self._full_architecture.with_dropped_layers(drop_layers)
        self.config: dict[str, Any] = config_without_layers(config, drop_layers)

    def write_description(self, target: Path, dtype: torch.dtype) -> None:
        """Writes config.json for weights of `dtype`, and copies the tokenizer's files, into the folder `target`."""
        config = {key: value for key, value in self.config.items() if key != "torch_dtype"}  # the name before "dtype"
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(target / "config.json", config)
        for pattern in _DESCRIBING_FILES:
            for path in sorted(self.folder.glob(pattern)):
                shutil.copyfile(path, target / path.name)


_DESCRIBING_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        WeightsError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(f"{path}: no such file; expected a model's folder with a {path.name}") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path`, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_new(target: Path) -> None:
    """Refuses a folder that exists: raises OutputError."""
    if target.exists():
        raise OutputError(f"{target}: expected a new folder, but it exists; give another one or move it away")


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` to write into; it becomes `target` when the block ends, and is gone if it fails.

    Raises:
        OutputError: the folder cannot be made or moved, anything in the block cannot be written, or `target` exists
            and `overwrite` is not set.
    """
    partial, replaced = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "replaced"))
    if not overwrite:
        require_new(target)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        _put_in_place(partial, target, replaced)
        _sync(target.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error}; free space, or give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, target: Path, replaced: Path) -> None:
    """Renames `partial` to `target`; a folder that was there is removed once the new one is in its place."""
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
