"""Weights in safetensors files: reading parts of tensors, writing a model as a stream of tensors."""

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tip.conversion.architecture import ModelArchitecture, kept_layers
from megatron_tip.conversion.experts import FusedPlace, fused_place
from megatron_tip.conversion.model_folder import ModelFolder, read_json
from megatron_tip.conversion.not_a_model import missing_weights, require_no_pointer
from megatron_tip.conversion.weight_map import hf_shapes
from megatron_tip.errors import WeightsError
from megatron_tip.files import write_json

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_FILE_BYTES = 5_000_000_000

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_COMPARED = 16_384
_LAYER = re.compile(r"^(model\.layers\.)(\d+)\.")


class HfCheckpoint(ModelFolder):
    """A Hugging Face directory with its weights, presented without the dropped layers.

    Tensor names count the remaining layers. Each expert's matrices have their own names, also where the files hold one
    tensor of all experts. Opening reads only headers and checks that every tensor exists with the right shape, so that
    every rank refuses a bad directory before anything is built.
    """

    def __init__(self, folder: str | Path, drop_layers: Collection[int] = ()) -> None:
        """Opens `folder`; `drop_layers` count the checkpoint's layers.

        Raises:
            WeightsError: a file is missing or truncated; a tensor is missing, unknown or of another shape; the
                architecture is not supported.
        """
        super().__init__(folder, drop_layers)
        self._kept_layers = kept_layers(self._full_architecture.num_layers, drop_layers)
        self._files = _tensor_files(self.folder)
        self._fused = _fused_experts(self._full_architecture, self._files)
        self._check(self._full_architecture)
        self.describing_files()  # needed at the end of a run: what cannot be read is said at its start

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the word embeddings, and usually of all weights."""
        header = self._slice(_EMBEDDINGS)
        return next(dtype for dtype, name in _DTYPE_NAMES.items() if name == header.get_dtype())

    def read(self, name: str) -> Tensor:
        """Returns the whole tensor, in the checkpoint's dtype, on the CPU."""
        return self._slice(name)[:]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows `start:stop` of a tensor; rows beyond its end are zero (a padded vocabulary)."""
        tensor_slice = self._slice(name)
        num_rows = tensor_slice.get_shape()[0]
        rows = tensor_slice[min(start, num_rows) : min(stop, num_rows)]
        missing = stop - start - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns `start:stop` of a matrix."""
        return self._slice(name)[:, start:stop]

    def _slice(self, name: str) -> Any:
        source = _LAYER.sub(lambda match: f"{match[1]}{self._kept_layers[int(match[2])]}.", name)
        # Reopened each time: an open file stays mapped, and its pages count as this process's memory.
        place = self._fused.get(source)
        if place is not None:
            return _ExpertSlice(_open(self._files[place.name]).get_slice(place.name), place)
        return _open(self._files[source]).get_slice(source)

    def _check(self, architecture: ModelArchitecture) -> None:
        expected = _stored_shapes(architecture, self._fused)
        missing = sorted(expected.keys() - self._files.keys())
        if missing:
            raise WeightsError(
                f"{self.folder}: expected a tensor {missing[0]}, found none ({len(missing)} are missing)"
            )
        ignored = {_HEAD} if architecture.tied_embeddings else set()
        unknown = sorted(
            name for name in self._files.keys() - expected.keys() - ignored if not name.endswith("rotary_emb.inv_freq")
        )
        if unknown:
            raise WeightsError(
                f"{self.folder}: expected the tensors of a {architecture.family} model, also found {unknown[0]} "
                f"({len(unknown)} are unknown); leaving it out would give a different model"
            )
        opened = {path: _open(path) for path in set(self._files.values())}
        for name, shape in expected.items():
            header = opened[self._files[name]].get_slice(name)
            if tuple(header.get_shape()) != shape or header.get_dtype() not in _DTYPE_NAMES.values():
                raise WeightsError(
                    f"{self.folder}: expected {name} of shape {shape} in {' or '.join(_DTYPE_NAMES.values())}, "
                    f"got {tuple(header.get_shape())} in {header.get_dtype()}"
                )
        if architecture.tied_embeddings and _HEAD in self._files:
            self._check_tied_head()

    def _check_tied_head(self) -> None:
        """Refuses a stored LM head that is not the embeddings although config.json calls both tied.

        Raises:
            WeightsError: they differ; transformers then uses the head that is stored, and an export would lose it.
        """
        embeddings, head = (_open(self._files[name]).get_slice(name) for name in (_EMBEDDINGS, _HEAD))
        equal = list(embeddings.get_shape()) == list(head.get_shape())
        num_rows = embeddings.get_shape()[0]
        for start in range(0, num_rows, _ROWS_COMPARED):
            rows = slice(start, min(start + _ROWS_COMPARED, num_rows))
            equal = equal and torch.equal(embeddings[rows], head[rows])
        if not equal:
            raise WeightsError(
                f"{self.folder}: expected {_HEAD} to be the word embeddings, as config.json has tie_word_embeddings, "
                "got another one; set tie_word_embeddings to false if the head is right, or remove it from the weights"
            )


class _ExpertSlice:
    """One expert's matrix within a tensor of all experts; has what is used here of safetensors' slices."""

    def __init__(self, whole: Any, place: FusedPlace) -> None:
        _, num_rows, self._num_columns = whole.get_shape()
        self._whole, self._expert, self._rows = whole, place.expert, range(num_rows)[place.rows]

    def get_shape(self) -> list[int]:
        return [len(self._rows), self._num_columns]

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        wanted = self._rows[rows]
        return self._whole[self._expert : self._expert + 1, wanted.start : wanted.stop, columns][0]


def _fused_experts(architecture: ModelArchitecture, files: Collection[str]) -> dict[str, FusedPlace]:
    """Returns, by name, where the experts' matrices lie that `files` hold only within a tensor of all experts."""
    if architecture.experts is None:
        return {}
    absent = (name for name in hf_shapes(architecture) if name not in files)
    places = {name: fused_place(name, architecture.experts.ffn_hidden_size) for name in absent}
    return {name: place for name, place in places.items() if place is not None and place.name in files}


def _stored_shapes(architecture: ModelArchitecture, fused: dict[str, FusedPlace]) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor that the files must hold."""
    stored: dict[str, tuple[int, ...]] = {}
    for name, (num_rows, *columns) in hf_shapes(architecture).items():
        place = fused.get(name)
        if place is None:
            stored[name] = (num_rows, *columns)
        elif architecture.experts is not None:
            matrices = 1 if place.rows == slice(None) else 2
            stored[place.name] = (architecture.experts.num_experts, matrices * num_rows, *columns)
    return stored


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes `tensors` into `folder`, cast to `dtype`, one at a time; several files and an index if one is too large.

    `shapes` names every tensor with its shape, in the order of `tensors`: a safetensors file begins with its table of
    contents, and this way no tensor has to be buffered.

    Raises:
        OSError: the disk is full or the folder cannot be written to.
    """
    files = _plan_files(shapes, dtype.itemsize, max_file_bytes)
    stream = iter(tensors)
    for file_name, names in files.items():
        _write_file(folder / file_name, stream, {name: shapes[name] for name in names}, dtype)
    assert next(stream, None) is None, "more tensors than announced"
    if len(files) > 1:
        weight_map = {name: file_name for file_name, names in files.items() for name in names}
        total_size = sum(_num_bytes(shape, dtype.itemsize) for shape in shapes.values())
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _plan_files(shapes: dict[str, tuple[int, ...]], itemsize: int, max_file_bytes: int) -> dict[str, list[str]]:
    """Returns the names of each file's tensors; a tensor larger than a file gets its own file."""
    groups: list[list[str]] = [[]]
    room = max_file_bytes
    for name, shape in shapes.items():
        num_bytes = _num_bytes(shape, itemsize)
        if num_bytes > room and groups[-1]:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= num_bytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _write_file(
    path: Path, stream: Iterator[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _num_bytes(shape, dtype.itemsize)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data that follows
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for expected in shapes:
            name, tensor = next(stream)
            assert (name, tuple(tensor.shape)) == (expected, shapes[name]), f"expected {expected}, got {name}"
            data = tensor.to("cpu", dtype).contiguous().flatten()
            file.write(data.view(torch.uint8).numpy().data)


def _num_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    return torch.Size(shape).numel() * itemsize


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Returns each tensor's name and the file that holds it; every file's header has been read.

    Where a single file lies beside an index, the single file counts, as it does for transformers.
    """
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if single.exists():
        if index.exists():
            logger.warning(
                "%s: holds %s and %s; the weights are those of %s, as transformers reads the folder",
                *(folder, SINGLE_NAME, INDEX_NAME, SINGLE_NAME),
            )
        return _names_in(single)
    if not index.exists():
        return _names_in(single)  # which says that there are none
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{index}: expected a weight_map from tensor names to file names, got {weight_map!r:.200}")
    tensors: dict[str, Path] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise WeightsError(f"{index}: expected names of files in the same folder, got {file_name!r}")
        tensors |= _names_in(folder / file_name)
    return tensors


def _names_in(path: Path) -> dict[str, Path]:
    return dict.fromkeys(_open(path).keys(), path)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; {missing_weights(path.parent)}")
    require_no_pointer(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a complete safetensors file ({error}); fetch it again") from error
