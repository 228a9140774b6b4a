"""Loading Megatron's sharded checkpoints without running anything that lies in them.

A checkpoint can come from anybody, with checksums that fit. It holds pickles in three places. The index (`.metadata`)
is one: it is read by an unpickler that knows the record types of torch's format and nothing else. Shards are others:
those of tensors are read with torch's `weights_only`; torch would unpickle whatever the index calls bytes, so an index
may say that only of entries that are not asked for, and the planner refuses bytes as well. The common state
(`common.pt`) is read with `weights_only` too.
"""

import pickle
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingException, maybe_load_config
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as megatron_format
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_tip.errors import WeightsError

INDEX_NAME = ".metadata"


def load_tensors(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns `state` with its sharded tensors, all of which are read from `folder`, and the common state.

    Collective over the world.

    Args:
        state: a nested dict of ShardedTensor; no ShardedObject, since those are pickles.

    Raises:
        WeightsError: the checkpoint lacks a tensor or holds one of another shape, a file is damaged, or the checkpoint
            would have run code; on every rank.
    """
    _check_format(folder)
    try:
        force_all_tensors_to_non_fp8(state)
        sharded, not_saved, factories = load_preprocess(state)
        sharded, _ = extract_sharded_base(sharded)
        loaded = _common_state(folder)
        merge(loaded, not_saved)
        validate_sharding_integrity(determine_global_metadata(sharded)[1])
        merge(loaded, _sharded_tensors(sharded, folder))
        return apply_factory_merges(loaded, factories)  # type: ignore[return-value]
    except WeightsError:
        raise
    except (CheckpointException, CheckpointingException, OSError, RuntimeError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder}: cannot be loaded: {reason_of(error)}") from error


def read_index(path: Path) -> Metadata:
    """Returns the index of a checkpoint.

    Raises:
        WeightsError: it does not exist, is no index, names anything but the records of torch's format, or names files
            outside the checkpoint's own folder.
    """
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; the checkpoint is incomplete") from None
    except Exception as error:  # a broken pickle can raise almost anything
        raise WeightsError(f"{path}: not the index of a checkpoint: {error}") from error
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
        raise WeightsError(f"{path}: expected the index of a checkpoint, got {type(index).__name__}")
    for place in (index.storage_data or {}).values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or PurePosixPath(name).name != name:
            raise WeightsError(f"{path}: expected names of files in the same folder, got {name!r}")
    return index


def _check_format(folder: Path) -> None:
    """Raises WeightsError if Megatron cannot tell the checkpoint's format from its metadata.json."""
    path = folder / CONFIG_FNAME
    try:
        is_known = maybe_load_config(str(folder)) is not None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path}: expected a checkpoint's format, cannot read it: {reason_of(error)}") from error
    if not is_known:
        raise WeightsError(f"{path}: no such file; the checkpoint is incomplete")


def reason_of(error: BaseException) -> str:
    """Returns one line that says what failed: of torch's collective error, the first rank's own."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _sharded_tensors(sharded: Any, folder: Path) -> Any:
    """Returns the tensors, read as Megatron reads them, but with a reader and a planner that unpickle nothing."""
    reader = _Reader(folder)
    wanted = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]
    reader.check_tensors(value.key for value in wanted)
    by_key, names, renamed = megatron_format._replace_state_dict_keys_with_sharded_keys(sharded)
    tensors: Any = megatron_format.mcore_to_pyt_state_dict(by_key, True)
    planner = _Planner(
        shapes_validation_sharded_tensors=[value for value in wanted if not value.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={value.key: value for value in wanted if value.allow_shape_mismatch},
    )
    state_dict_loader.load_state_dict(tensors, reader, planner=planner)
    loaded: Any = {key: megatron_format._unwrap_pyt_sharded_tensor(value) for key, value in tensors.items()}
    restored = megatron_format._replace_sharded_keys_with_state_dict_keys(loaded, names, renamed)
    megatron_format._restore_dict_types(restored, sharded)
    return restored


def _common_state(folder: Path) -> Any:
    path = folder / COMMON_STATE_FNAME
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(
            f"{path}: expected plain values as a checkpoint's common state, cannot read them: {reason_of(error)}"
        ) from error


class _Reader(FileSystemReader):
    """torch's reader with a checked index, which is read once."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._index_path = Path(folder) / INDEX_NAME
        self._index: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        if self._index is None:
            self._index = read_index(self._index_path)
            self._index.storage_meta = StorageMeta(load_id=self.load_id)
        return self._index

    def check_tensors(self, keys: Any) -> None:
        """Raises WeightsError unless the index calls each of `keys` a tensor."""
        entries = self.read_metadata().state_dict_metadata
        for key in keys:
            if key not in entries:
                raise WeightsError(f"{self._index_path}: expected the tensor {key}, found no such entry")
            if type(entries[key]) is not TensorStorageMetadata:
                raise WeightsError(
                    f"{self._index_path}: expected {key} to be a tensor, got {type(entries[key]).__name__}; do not "
                    "load checkpoints you do not trust"
                )


class _Planner(megatron_format.MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise WeightsError(f"{read_item.dest_index.fqn}: expected a tensor, got a pickle, which is never read")


class _IndexUnpickler(pickle.Unpickler):
    """Knows the record types of torch's distributed checkpoints, and nothing that could do anything."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _INDEX_MODULES:
            found = super().find_class(module, name)
            is_record = isinstance(found, type) and found.__module__ == module
            if is_record and (is_dataclass(found) or issubclass(found, Enum)):
                return found
            if isinstance(found, torch.dtype) or found in (torch.Size, torch.serialization._get_layout):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in it; do not load checkpoints you do not trust")


_INDEX_MODULES = (
    "torch",
    "torch.serialization",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
