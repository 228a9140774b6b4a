"""Megatron's sharded checkpoints of a model's weights, with a description of the model.

    megatron_tip.json   format, versions, the layout that wrote it
    config.json         the model, as Hugging Face describes it; tokenizer files beside it
    weights/            megatron.core.dist_checkpointing, readable in any tp x pp

Loading runs no code from the checkpoint. Tensors are read with torch's `weights_only`. Objects (which Transformer
Engine layers add for fp8) are written because Megatron does so, and never read. The index, a pickle, is first checked
to name only the record types of torch's own format.
"""

import pickle
from contextlib import ExitStack
from dataclasses import is_dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tip.conversion.background_save import InProcessSave
from megatron_tip.conversion.model_folder import ModelFolder, read_json
from megatron_tip.errors import OutputError, WeightsError
from megatron_tip.files import new_folder, output_errors, write_json
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.parallel.together import run_on, together

MANIFEST_NAME = "megatron_tip.json"
WEIGHTS_NAME = "weights"
FORMAT = "megatron_tip weights 1"


class MegatronCheckpoint(ModelFolder):
    """A folder that `save_megatron_checkpoint` wrote."""

    def __init__(self, folder: str | Path) -> None:
        """Reads the folder's description, not its weights.

        Raises:
            WeightsError: it is not such a folder, has another format, or its index is not what it should be.
        """
        super().__init__(folder)
        manifest = read_json(self.folder / MANIFEST_NAME)
        if manifest.get("format") != FORMAT:
            raise WeightsError(f"{self.folder / MANIFEST_NAME}: expected the format {FORMAT!r}, got {manifest}")
        self.weights = self.folder / WEIGHTS_NAME
        check_index(self.weights / ".metadata")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return getattr(torch, self.config["dtype"])


def save_megatron_checkpoint(
    model: GPTModel, source: ModelFolder, groups: ModelGroups, target: Path, *, overwrite: bool = False
) -> None:
    """Writes the model's weights, sharded as they are, and the config and tokenizer of `source` as a new folder.

    Collective over the world. `target` must be the same shared folder on all machines.

    Raises:
        OutputError: `target` cannot be written, or exists and `overwrite` is not set; on every rank.
    """
    parameter = next(model.parameters())
    is_writer = dist.get_rank() == 0
    with ExitStack() as stack:

        def begin() -> str:
            with output_errors(target, setting="folder"):
                folder = stack.enter_context(new_folder(target, overwrite=overwrite))
                source.write_description(folder, parameter.dtype)
                write_json(folder / MANIFEST_NAME, _manifest(groups))
                (folder / WEIGHTS_NAME).mkdir()
            return str(folder / WEIGHTS_NAME)

        weights = run_on(0, begin, device=parameter.device)
        try:
            state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp})}
            dist_checkpointing.save(state, weights, sharded_strategy=InProcessSave(copies=False))
        except (CheckpointException, OSError) as error:
            reason = reason_of(error)
            raise OutputError(f"{target}: cannot be written: {reason}; free space, or give another folder") from error
        with together(device=parameter.device):
            if is_writer:
                stack.close()  # renames the folder


def load_megatron_checkpoint(model: GPTModel, checkpoint: MegatronCheckpoint, groups: ModelGroups) -> None:
    """Fills this rank's shards from a checkpoint of any layout; see `load_shards`."""
    load_shards(model, checkpoint.weights, groups)


def load_shards(model: GPTModel, weights: Path, groups: ModelGroups) -> None:
    """Fills this rank's shards from a folder of Megatron's shards of any layout, a run's checkpoint included.

    Collective over the world. The caller has checked the index (`check_index`). The padded vocabulary may differ from
    the saved one; padding rows become zero.

    Raises:
        WeightsError: on every rank; weights are missing, truncated or of another shape.
    """
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp})
    tensors = {key: value for key, value in sharded.items() if not isinstance(value, ShardedObject)}
    try:
        loaded: Any = dist_checkpointing.load({"model": tensors}, str(weights))
    except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
        raise WeightsError(f"{weights}: cannot be loaded: {reason_of(error)}") from error
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    missing = [key for key in missing if not key.endswith("_extra_state")]
    assert not missing, f"parameters missing from Megatron's shards: {missing}"
    assert not unexpected, f"shards that are not parameters: {unexpected}"


def _manifest(groups: ModelGroups) -> dict[str, Any]:
    grid = groups.grid
    return {
        "format": FORMAT,
        "layout": {"tp": grid.tp_size, "pp": grid.pp_size, "dp": grid.dp_size},
        "versions": {name: version(name) for name in ("megatron_core", "torch")},
    }


def reason_of(error: BaseException) -> str:
    """Returns the first rank's error within torch's collective one, in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def check_index(path: Path) -> None:
    """Raises WeightsError unless the pickle at `path` names only the record types of torch's format."""
    try:
        with path.open("rb") as file:
            _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; the checkpoint is incomplete") from None
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: not the index of a checkpoint: {error}") from error


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that admits only the record types of torch's distributed checkpoints, which run no code."""

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
