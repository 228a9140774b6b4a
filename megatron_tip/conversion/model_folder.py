"""Folders that hold a model: its description, config.json and tokenizer."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from megatron_tip.conversion.architecture import ModelArchitecture, config_without_layers
from megatron_tip.conversion.not_a_model import require_model_folder, require_no_pointer
from megatron_tip.errors import WeightsError
from megatron_tip.files import parse_json, write_json


class ModelFolder:
    """A folder with a model's config.json and tokenizer, presented without the dropped layers.

    `architecture` and `config` (the content of config.json) describe the model without them.
    """

    def __init__(self, folder: str | Path, drop_layers: Collection[int] = ()) -> None:
        """Reads `folder`; `drop_layers` count the layers of the folder's model.

        Raises:
            WeightsError: it is no model's folder, config.json is unreadable, or its architecture is not supported.
        """
        self.folder = Path(folder)
        require_model_folder(self.folder)
        config = read_json(self.folder / "config.json")
        self._full_architecture = ModelArchitecture.from_config(config, str(self.folder / "config.json"))
        self.architecture = self._full_architecture.with_dropped_layers(drop_layers)
        self.config: dict[str, Any] = config_without_layers(config, drop_layers)

    def write_description(self, target: Path, dtype: torch.dtype) -> None:
        """Writes config.json for weights of `dtype`, and copies the tokenizer's files, into the folder `target`."""
        config = {key: value for key, value in self.config.items() if key != "torch_dtype"}  # the old name of "dtype"
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(target / "config.json", config)
        for path in self.describing_files():
            copy = target / path.relative_to(self.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)

    def describing_files(self) -> list[Path]:
        """Returns the files besides config.json and the weights that make the folder usable: tokenizer, templates.

        Raises:
            WeightsError: one of them is a Git LFS pointer or cannot be read; an export at the end of a run would fail
                over it.
        """
        found = [path for pattern in _DESCRIBING_FILES for path in sorted(self.folder.glob(pattern)) if path.is_file()]
        for path in found:
            require_no_pointer(path)
            try:
                path.open("rb").close()
            except OSError as error:
                raise WeightsError(f"{path}: cannot be read ({error.strerror}); the model's export needs it") from error
        return found


_DESCRIBING_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`.

    Raises:
        WeightsError: the file does not exist, or holds something else.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(f"{path}: no such file; expected a model's folder with a {path.name}") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
