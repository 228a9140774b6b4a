"""A few layers of Qwen3-4B with random weights, on disk and in Megatron-Core; tiny ones for a CPU."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_tip.conversion.bridge import load_hf
from megatron_tip.conversion.known_models import KNOWN_MODELS
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.models.gpt import HiddenStatesModel, build_gpt, output_head_weight
from megatron_tip.models.packing import boundaries
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import ModelGroups, build_groups
from tools.gpu_checks.task import Task

_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}


def write_qwen3(task: Task, *, layers: int) -> tuple[Path, Any]:
    """Writes the model in bfloat16 as a Hugging Face directory; returns the folder, and transformers' model of it."""
    shape = {**KNOWN_MODELS["Qwen3-4B"].config, "num_hidden_layers": layers, **task.size({}, _TINY)}
    torch.manual_seed(0)
    with torch.device(task.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    folder = task.folder / "qwen3"
    model.save_pretrained(folder)
    return folder, model


def load_qwen3(folder: Path) -> tuple[HiddenStatesModel, HfCheckpoint, ModelGroups]:
    """Returns Megatron's model of `folder` on the one rank of this world, with its groups."""
    checkpoint = HfCheckpoint(folder)
    groups = build_groups(ModelGrid.over(1, tp_size=1, pp_size=1, owner="student"))
    vocab_size = checkpoint.architecture.vocab_size
    model = build_gpt(
        checkpoint.architecture,
        groups,
        padded_vocab_size=vocab_size,
        dtype=torch.bfloat16,
        transformer_impl="local",  # what a machine without Transformer Engine runs
    )
    load_hf(model, checkpoint, groups)
    return model, checkpoint, groups


def packed_logits(model: HiddenStatesModel, sequences: list[Tensor]) -> Tensor:
    """Returns the logits `[tokens, V]` of sequences of ids in one micro-batch."""
    ids = torch.cat(sequences)
    positions = torch.cat([torch.arange(len(sequence), device=ids.device) for sequence in sequences])
    lengths = [len(sequence) for sequence in sequences]
    hidden = model(ids[None], positions[None], None, packed_seq_params=boundaries(model, lengths))
    return hidden[:, 0] @ output_head_weight(model).T
