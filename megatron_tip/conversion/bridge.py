"""Transfer of weights between a Hugging Face directory and a model's shards, one parameter at a time."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_folder import ModelFolder
from megatron_tip.conversion.safetensors_io import HfCheckpoint, write_safetensors
from megatron_tip.conversion.weight_map import WeightMap, checkpoint_name, hf_shapes, output_head, weight_maps
from megatron_tip.errors import WeightsError
from megatron_tip.files import new_folder
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.parallel.together import together


@torch.no_grad()
def load_hf(model: GPTModel, checkpoint: HfCheckpoint, groups: ModelGroups) -> None:
    """Fills this rank's shards of `model` from `checkpoint`, reading only this rank's part. No collective.

    Values are cast to the parameters' dtype. Padding rows of the vocabulary become zero.

    Raises:
        WeightsError: the checkpoint's architecture lacks a parameter, or has it in another shape.
    """
    tp_rank, tp_size = groups.tp_rank, groups.grid.tp_size
    for name, parameter, weight in _local_parameters(model, checkpoint.architecture):
        shard = _read_shard(checkpoint, weight, tp_rank=tp_rank, tp_size=tp_size, num_rows=parameter.shape[0])
        if shard.shape != parameter.shape:
            raise WeightsError(
                f"load_hf: expected {name} of shape {tuple(shard.shape)} on a rank of tp {tp_size}, got a parameter "
                f"of {tuple(parameter.shape)}; build the model from the checkpoint's architecture"
            )
        parameter.copy_(shard)


def load_output_head(
    checkpoint: HfCheckpoint, *, tp_rank: int, tp_size: int, padded_vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """Returns the LM head's shard `[padded_vocab_size / tp_size, h]` of one rank, on the CPU; padding rows are zero.

    It is the checkpoint's own head, or its embeddings if the two are tied. A teacher's head is sharded over the
    student's tensor-parallel group, whatever the teacher's own layout.
    """
    num_rows = padded_vocab_size // tp_size
    weight = output_head(checkpoint.architecture)
    return _read_shard(checkpoint, weight, tp_rank=tp_rank, tp_size=tp_size, num_rows=num_rows).to(dtype)


@torch.no_grad()
def export_hf(
    model: GPTModel, architecture: ModelArchitecture, groups: ModelGroups, *, everywhere: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's weights by Hugging Face name, in the parameters' dtype, from the embeddings to the head.

    Collective over the ranks of the first copy of the model (`groups.dp_cp_rank == 0`): all of them must call it and
    exhaust it, at the same point of the program. The first of them (tp rank 0 of the first stage) yields every tensor;
    the others yield nothing. Other copies must not call it. A rank holds at most one Megatron parameter gathered over
    tp, and one tensor made from it. A yielded tensor may share memory with the model: do not write to it, and copy it
    to keep it beyond the next step. Padding rows of the vocabulary and a tied head are left out.

    Args:
        everywhere: every rank yields every tensor; each copy may call it, all of its ranks together.
    """
    assert everywhere or groups.dp_cp_rank == 0, f"export_hf is for copy 0, called by copy {groups.dp_cp_rank}"
    parameters = {weight.name: parameter.detach() for _, parameter, weight in _local_parameters(model, architecture)}
    reference = next(iter(parameters.values()))
    for weight in weight_maps(architecture):
        stage = _stage_of(weight, architecture, groups.grid.pp_size)
        shards = None
        if groups.pp_rank == stage:
            shards = _gather(parameters[weight.name], weight, groups, everywhere=everywhere)
        if everywhere:
            yield from _at_all_stages(shards, weight, stage, reference, groups)
        elif groups.tp_rank == 0:
            yield from _at_first_stage(shards, weight, stage, reference, groups)


def save_hf(
    model: GPTModel,
    source: ModelFolder,
    groups: ModelGroups,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the model as a Hugging Face directory `target`, with the config and tokenizer of `source`.

    Streams through `export_hf` on the first copy of the model, whose first rank writes beside `target` and renames once
    everything is on disk. Collective over the world. `dtype`: of the files; None: the parameters'.

    Raises:
        OutputError: `target` cannot be written, or exists and `overwrite` is not set; on every rank.
    """
    parameter = next(model.parameters())
    stream = export_hf(model, source.architecture, groups) if groups.dp_cp_rank == 0 else iter(())
    with together(device=parameter.device):
        try:
            if groups.dp_cp_rank == groups.tp_rank == groups.pp_rank == 0:
                with new_folder(target, overwrite=overwrite) as folder:
                    written_dtype = dtype or parameter.dtype
                    source.write_description(folder, written_dtype)
                    write_safetensors(folder, stream, hf_shapes(source.architecture), written_dtype)
        finally:
            for _ in stream:  # on the other ranks; and after a failure, because the others still send the rest
                pass


def _local_parameters(
    model: GPTModel, architecture: ModelArchitecture
) -> Iterator[tuple[str, torch.nn.Parameter, WeightMap]]:
    """Returns this rank's parameters with their names and maps."""
    maps = {weight.name: weight for weight in [*weight_maps(architecture), output_head(architecture)]}
    for name, parameter in model.named_parameters():
        global_name = checkpoint_name(_LOCAL_LAYER.sub(lambda match: _global_layer(model, match), name))
        if global_name not in maps:
            raise WeightsError(f"a {architecture.family} model has no weight for the parameter {name}")
        yield name, parameter, maps[global_name]


_LOCAL_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")


def _global_layer(model: GPTModel, match: re.Match[str]) -> str:
    layer: Any = model.decoder.layers[int(match[0])]
    return str(layer.layer_number - 1)  # Megatron counts from 1, over all stages


def _stage_of(weight: WeightMap, architecture: ModelArchitecture, pp_size: int) -> int:
    if weight.layer is not None:
        return weight.layer * pp_size // architecture.num_layers
    return 0 if weight.name.startswith("embedding.") else pp_size - 1


def _read_shard(checkpoint: HfCheckpoint, weight: WeightMap, *, tp_rank: int, tp_size: int, num_rows: int) -> Tensor:
    """Returns one rank's part of a Megatron parameter, padded to `num_rows` rows (only a vocabulary is padded)."""
    if weight.partition_dim is None:
        return checkpoint.read(weight.hf_names[0])
    if weight.partition_dim == 1:
        num_columns = weight.hf_shapes[0][1] // tp_size
        return checkpoint.read_columns(weight.hf_names[0], tp_rank * num_columns, (tp_rank + 1) * num_columns)
    if len(weight.hf_names) == 1:
        return checkpoint.read_rows(weight.hf_names[0], tp_rank * num_rows, (tp_rank + 1) * num_rows)
    pieces = []
    for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True):
        rows = shape[0] // tp_size
        piece = checkpoint.read_rows(name, tp_rank * rows, (tp_rank + 1) * rows)
        pieces.append(piece.unflatten(0, (_units_per_rank(weight, tp_size), -1)))
    return torch.cat(pieces, dim=1).flatten(0, 1)


def _merge_shards(shards: Tensor, weight: WeightMap, piece: int) -> Tensor:
    """Returns the `piece`-th Hugging Face tensor from all ranks' parts `[tp, ...]` of a Megatron parameter."""
    if weight.partition_dim is None:
        return shards[0]
    if weight.partition_dim == 1:
        return shards.transpose(0, 1).flatten(1)
    if len(weight.hf_names) == 1:
        return shards.flatten(0, 1)[: weight.hf_shapes[0][0]]
    tp_size = shards.shape[0]
    units = _units_per_rank(weight, tp_size)
    sizes = [shape[0] // tp_size // units for shape in weight.hf_shapes]
    return shards.unflatten(1, (units, -1)).split(sizes, dim=2)[piece].flatten(0, 2)


def _units_per_rank(weight: WeightMap, tp_size: int) -> int:
    return 1 if weight.num_units is None else weight.num_units // tp_size


def _gather(shard: Tensor, weight: WeightMap, groups: ModelGroups, *, everywhere: bool) -> Tensor | None:
    """Returns all tensor-parallel ranks' parts `[tp, ...]`, on tp rank 0 or `everywhere`; None on the others."""
    if weight.partition_dim is None or groups.grid.tp_size == 1:
        return shard[None] if everywhere or groups.tp_rank == 0 else None
    if everywhere:
        shards = shard.new_empty(groups.grid.tp_size, *shard.shape)
        dist.all_gather(list(shards), shard.contiguous(), group=groups.tp_group)
        return shards
    shards = shard.new_empty(groups.grid.tp_size, *shard.shape) if groups.tp_rank == 0 else None
    parts = None if shards is None else list(shards)
    dist.gather(shard.contiguous(), parts, group=groups.tp_group, group_dst=0)
    return shards


def _at_first_stage(
    shards: Tensor | None, weight: WeightMap, stage: int, reference: Tensor, groups: ModelGroups
) -> Iterator[tuple[str, Tensor]]:
    """Merges what `stage` gathered and sends it to the first stage, which yields it. For tp rank 0 of every stage."""
    for piece, (name, shape) in enumerate(zip(weight.hf_names, weight.hf_shapes, strict=True)):
        tensor = None if shards is None else _merge_shards(shards, weight, piece)
        if tensor is not None and groups.pp_rank != 0:
            dist.send(tensor.contiguous(), group=groups.pp_group, group_dst=0)
        elif groups.pp_rank == 0:
            if tensor is None:
                tensor = reference.new_empty(shape)
                dist.recv(tensor, group=groups.pp_group, group_src=stage)
            yield name, tensor


def _at_all_stages(
    shards: Tensor | None, weight: WeightMap, stage: int, reference: Tensor, groups: ModelGroups
) -> Iterator[tuple[str, Tensor]]:
    """Merges what `stage` gathered, broadcasts it to all stages and yields it on each of them."""
    for piece, (name, shape) in enumerate(zip(weight.hf_names, weight.hf_shapes, strict=True)):
        tensor = reference.new_empty(shape) if shards is None else _merge_shards(shards, weight, piece)
        if groups.grid.pp_size > 1:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, group=groups.pp_group, group_src=stage)
        yield name, tensor
