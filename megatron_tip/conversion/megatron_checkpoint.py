"""Megatron's sharded checkpoints of a model's weights, with a description of the model.

    megatron_tip.json   format, versions, the layout that wrote it
    config.json         the model, as Hugging Face describes it; tokenizer files beside it
    weights/            megatron.core.dist_checkpointing, readable in any tp x pp

Loading runs no code from the checkpoint: see `tensor_load`. Objects, which Transformer Engine's layers add for fp8, are
written for Megatron's sake and never read.
"""

from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tip.conversion.background_save import ShardedSave
from megatron_tip.conversion.model_folder import ModelFolder, read_json
from megatron_tip.conversion.tensor_load import INDEX_NAME, load_tensors, read_index, reason_of
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
        read_index(self.weights / INDEX_NAME)

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
            save = ShardedSave(state, Path(weights), copies=False)
            save.write()
            save.finish()
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

    Collective over the world. The padded vocabulary may differ from the saved one; padding rows become zero.

    Raises:
        WeightsError: on every rank; weights are missing, truncated or of another shape.
    """
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp})
    tensors = {key: value for key, value in sharded.items() if not isinstance(value, ShardedObject)}
    loaded = load_tensors({"model": tensors}, weights)
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    missing = [key for key in missing if not key.endswith("_extra_state")]
    assert not missing, f"parameters missing from Megatron's shards: {missing}"
    assert not unexpected, f"shards that are not parameters: {unexpected}"


def _manifest(groups: ModelGroups) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "layout": groups.grid.sizes(),
        "versions": {name: version(name) for name in ("megatron_core", "torch")},
    }
