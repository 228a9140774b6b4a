"""Hugging Face directories: reading parts of tensors, writing whole models as a stream."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tip.conversion.architecture import ModelArchitecture, config_without_layers, kept_layers, read_config
from megatron_tip.conversion.weight_map import weight_maps
from megatron_tip.errors import WeightsError

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class HfCheckpoint:
    """A Hugging Face directory, seen as if the dropped layers had never been in it.

    `architecture` and `config` (the content of config.json) describe the model that is left; tensor names count its
    layers. Opening reads headers alone and checks that every tensor is there with the right shape, so that a bad
    directory is refused by every rank alike, before anything is built.
    """

    def __init__(self, folder: str | Path, drop_layers: Collection[int] = ()) -> None:
        """Opens `folder`; `drop_layers` are counted in the checkpoint.

        Raises:
            WeightsError: a file that is missing or truncated, a tensor that is missing, unknown or of another shape,
                an architecture that is not supported.
        """
        self.folder = Path(folder)
        full_config = read_config(self.folder)
        full = ModelArchitecture.from_config(full_config, str(self.folder / "config.json"))
        self.architecture = full.with_dropped_layers(drop_layers)
        self.config: dict[str, Any] = config_without_layers(full_config, drop_layers)
        self._kept_layers = kept_layers(full.num_layers, drop_layers)
        self._files = _open_files(self.folder)
        self._check(full)

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the checkpoint's dtype, on the CPU."""
        return self._slice(name)[:]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of a tensor; rows behind its end are zero (a padded vocabulary)."""
        tensor_slice = self._slice(name)
        num_rows = tensor_slice.get_shape()[0]
        rows = tensor_slice[min(start, num_rows) : min(stop, num_rows)]
        missing = stop - start - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns `start:stop` of a matrix."""
        return self._slice(name)[:, start:stop]

    def _slice(self, name: str) -> Any:
        source = _LAYER.sub(lambda match: f"{match[1]}{self._kept_layers[int(match[2])]}.", name)
        return self._files[source].get_slice(source)

    def _check(self, full: ModelArchitecture) -> None:
        expected = {
            name: shape
            for weight in weight_maps(full)
            for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
        }
        missing = sorted(expected.keys() - self._files.keys())
        if missing:
            raise WeightsError(
                f"{self.folder}: expected a tensor {missing[0]}, found none ({len(missing)} are missing)"
            )
        ignored = {"lm_head.weight"} if full.tied_embeddings else set()
        unknown = sorted(
            name for name in self._files.keys() - expected.keys() - ignored if not name.endswith("rotary_emb.inv_freq")
        )
        if unknown:
            raise WeightsError(
                f"{self.folder}: a {full.family} model has no tensor {unknown[0]} ({len(unknown)} are unknown); "
                "it would be left out silently"
            )
        for name, shape in expected.items():
            header = self._files[name].get_slice(name)
            if tuple(header.get_shape()) != shape or header.get_dtype() not in _DTYPES:
                raise WeightsError(
                    f"{self.folder}: expected {name} of shape {shape} and type {' or '.join(_DTYPES)}, "
                    f"got {tuple(header.get_shape())} {header.get_dtype()}"
                )


_LAYER = re.compile(r"^(model\.layers\.)(\d+)\.")
_DTYPES = ("F32", "BF16", "F16")


def _open_files(folder: Path) -> dict[str, Any]:
    """Each tensor's name and the open file that holds it."""
    index = folder / INDEX_NAME
    if not index.exists():
        return _open_file(folder / SINGLE_NAME)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        file_names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: expected a JSON object with a weight_map of names, got: {error!r}") from error
    tensors: dict[str, Any] = {}
    for file_name in file_names:
        if Path(file_name).name != file_name:
            raise WeightsError(f"{index}: expected file names in the same folder, got {file_name!r}")
        tensors |= _open_file(folder / file_name)
    return tensors


def _open_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; the model's weights are missing or not in safetensors format")
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a complete safetensors file ({error}); fetch it again") from error
    return dict.fromkeys(file.keys(), file)
