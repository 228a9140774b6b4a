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
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.parallel.together import together


@torch.no_grad()
def load_hf(model: GPTModel, checkpoint: HfCheckpoint, groups: ModelGroups) -> None:
    """Fills this rank's shards of `model` from `checkpoint`, reading only this rank's part. No collective.

    Values are cast to the parameters' dtype. Padding rows of the vocabulary become zero.

    Raises:
        WeightsError: the checkpoint's architecture lacks a parameter, or has it in another shape.
    """
    for name, parameter, weight in local_parameters(model, checkpoint.architecture, groups):
        tp_group = _sharding_group(weight, groups)
        tp_rank, tp_size = tp_group.rank(), tp_group.size()
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
    shard = _read_shard(checkpoint, weight, tp_rank=tp_rank, tp_size=tp_size, num_rows=num_rows).to(dtype)
    return shard.data  # a view would keep its base, and so its memory, when it is offloaded


@torch.no_grad()
def export_hf(
    model: GPTModel, architecture: ModelArchitecture, groups: ModelGroups, *, everywhere: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's weights by Hugging Face name, in the parameters' dtype, from the embeddings to the head.

    Collective over the ranks that hold the first copy of the model or the first copy of the experts
    (`groups.holds_first_copy`): all of them must call it and exhaust it, at the same point of the program. Global rank
    0 yields every tensor; the others yield nothing. Other ranks must not call it. A rank holds at most one Megatron
    parameter gathered over its shards, and one tensor made from it. A yielded tensor may share memory with the model:
    do not write to it, and copy it to keep it beyond the next step. Padding rows of the vocabulary and a tied head are
    left out. Each expert's matrices have their own names, which engines read whatever their own layout.

    Args:
        everywhere: every rank yields every tensor. Each copy may call it, all of its ranks together, and with it all
            copies that share its experts.
    """
    assert everywhere or groups.holds_first_copy, f"export_hf is for the first copy, called by rank {groups.rank}"
    own = local_parameters(model, architecture, groups)
    parameters = {weight.name: parameter.detach() for _, parameter, weight in own}
    reference = next(model.parameters())
    for weight in weight_maps(architecture):
        hops = _hops(weight, architecture, groups)
        shards = None
        is_asked = everywhere or _is_of_first_copy(weight, groups)
        if is_asked and _is_held_here(hops):
            shards = _gather(parameters[weight.name], weight, groups, everywhere=everywhere)
        if everywhere:
            yield from _at_all_ranks(shards, weight, hops, reference)
        elif is_asked and _sharding_group(weight, groups).rank() == 0:
            yield from _at_first_rank(shards, weight, hops, reference)


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

    Streams through `export_hf` to global rank 0, which writes beside `target` and renames once everything is on disk.
    Collective over the world. `dtype`: of the files; None: the parameters'.

    Raises:
        OutputError: `target` cannot be written, or exists and `overwrite` is not set; on every rank.
    """
    parameter = next(model.parameters())
    stream = export_hf(model, source.architecture, groups) if groups.holds_first_copy else iter(())
    with together(device=parameter.device):
        try:
            if groups.rank == 0:
                with new_folder(target, overwrite=overwrite) as folder:
                    written_dtype = dtype or parameter.dtype
                    source.write_description(folder, written_dtype)
                    write_safetensors(folder, stream, hf_shapes(source.architecture), written_dtype)
        finally:
            for _ in stream:  # on the other ranks; and after a failure, because the others still send the rest
                pass


def local_parameters(
    model: GPTModel, architecture: ModelArchitecture, groups: ModelGroups
) -> Iterator[tuple[str, torch.nn.Parameter, WeightMap]]:
    """Returns this rank's parameters with their names and maps."""
    maps = {weight.name: weight for weight in [*weight_maps(architecture), output_head(architecture)]}
    for name, parameter in model.named_parameters():
        global_name = _LOCAL_LAYER.sub(lambda match: _global_layer(model, match), name)
        global_name = _global_expert(global_name, architecture, groups)
        if global_name not in maps:
            global_name = checkpoint_name(global_name)
        if global_name not in maps:
            raise WeightsError(f"a {architecture.family} model has no weight for the parameter {name}")
        yield name, parameter, maps[global_name]


_LOCAL_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_LOCAL_EXPERT = re.compile(r"(\.mlp\.experts)(?:\.local_experts\.(\d+))?(\.linear_fc[12]\.weight)(\d*)$")
"""An expert's matrix of Megatron's SequentialMLP (`local_experts.3.linear_fc1.weight`), or of its TEGroupedMLP
(`linear_fc1.weight3`).
"""


def _global_layer(model: GPTModel, match: re.Match[str]) -> str:
    layer: Any = model.decoder.layers[int(match[0])]
    return str(layer.layer_number - 1)  # Megatron counts from 1, over all stages


def _global_expert(name: str, architecture: ModelArchitecture, groups: ModelGroups) -> str:
    match = _LOCAL_EXPERT.search(name)
    if match is None or architecture.experts is None:
        return name
    first = groups.ep_rank * (architecture.experts.num_experts // groups.grid.ep_size)
    return f"{name[: match.start()]}{match[1]}.{first + int(match[2] or match[4])}{match[3]}"


def _sharding_group(weight: WeightMap, groups: ModelGroups) -> dist.ProcessGroup:
    """Returns the ranks that each hold a shard of a parameter."""
    return groups.tp_group if weight.expert is None else groups.expert_tp_group


def _is_of_first_copy(weight: WeightMap, groups: ModelGroups) -> bool:
    """Returns whether this rank's replica, or copy of the experts, is the first."""
    return (groups.dp_cp_rank if weight.expert is None else groups.expert_dp_rank) == 0


Hop = tuple[dist.ProcessGroup, int]
"""A group, and the place in it whose rank holds a tensor."""


def _hops(weight: WeightMap, architecture: ModelArchitecture, groups: ModelGroups) -> list[Hop]:
    """Returns the groups over which a parameter goes from the ranks that hold it to all others, in order."""
    hops = [(groups.pp_group, _stage_of(weight, architecture, groups.grid))]
    if weight.expert is not None and architecture.experts is not None:
        owner = weight.expert * groups.grid.ep_size // architecture.experts.num_experts
        hops.insert(0, (groups.ep_group, owner))
    return hops


def _is_held_here(hops: list[Hop]) -> bool:
    """Returns whether this rank is the one that holds the tensor in each group."""
    return all(group.rank() == source for group, source in hops)


def _stage_of(weight: WeightMap, architecture: ModelArchitecture, grid: ModelGrid) -> int:
    if weight.layer is not None:
        return grid.stage_of(weight.layer, architecture.num_layers)
    return 0 if weight.name.startswith("embedding.") else grid.pp_size - 1


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
    """Returns all ranks' parts `[tp, ...]`, on the first rank of the group or `everywhere`; None on the others."""
    group = _sharding_group(weight, groups)
    if weight.partition_dim is None or group.size() == 1:
        return shard[None] if everywhere or group.rank() == 0 else None
    if everywhere:
        shards = shard.new_empty(group.size(), *shard.shape)
        dist.all_gather(list(shards), shard.contiguous(), group=group)
        return shards
    shards = shard.new_empty(group.size(), *shard.shape) if group.rank() == 0 else None
    parts = None if shards is None else list(shards)
    dist.gather(shard.contiguous(), parts, group=group, group_dst=0)
    return shards


def _at_first_rank(
    shards: Tensor | None, weight: WeightMap, hops: list[Hop], reference: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Merges what the holders gathered and sends it to the first rank of each hop in turn; the last one yields it."""
    for piece, (name, shape) in enumerate(zip(weight.hf_names, weight.hf_shapes, strict=True)):
        tensor = None if shards is None else _merge_shards(shards, weight, piece)
        for place, (group, source) in enumerate(hops):
            has_passed = all(earlier.rank() == 0 for earlier, _ in hops[:place])
            if not has_passed or not _is_held_here(hops[place + 1 :]):
                continue
            if tensor is not None and group.rank() != 0:
                dist.send(tensor.contiguous(), group=group, group_dst=0)
                tensor = None
            elif tensor is None and group.rank() == 0:
                tensor = reference.new_empty(shape)
                dist.recv(tensor, group=group, group_src=source)
        if tensor is not None:
            yield name, tensor


def _at_all_ranks(
    shards: Tensor | None, weight: WeightMap, hops: list[Hop], reference: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Merges what the holders gathered, broadcasts it over the groups of `hops` and yields it on every rank."""
    for piece, (name, shape) in enumerate(zip(weight.hf_names, weight.hf_shapes, strict=True)):
        tensor = reference.new_empty(shape) if shards is None else _merge_shards(shards, weight, piece).contiguous()
        for place, (group, source) in enumerate(hops):
            if group.size() > 1 and _is_held_here(hops[place + 1 :]):
                dist.broadcast(tensor, group=group, group_src=source)
        yield name, tensor
