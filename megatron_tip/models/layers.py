"""Layers that need only torch: Megatron's own linear layers with torch's norm, attention and recomputation."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class RMSNorm(torch.nn.RMSNorm):
    """An RMSNorm whose weight tells Megatron to reduce its gradient over the sequence-parallel ranks.

    Megatron's fallback norm, without Apex or Transformer Engine, refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class PackedAttention(torch.nn.Module):
    """Causal attention within each sequence of a micro-batch, with torch's fused kernel.

    The kernel never stores the scores of all pairs of positions. One call per sequence computes no pair of different
    sequences and no padding; a mask over the whole micro-batch would cost the square of its length.
    """

    def __init__(self, config: TransformerConfig, attn_mask_type: AttnMaskType, **_: Any) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, f"expected causal attention, got {attn_mask_type}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams,
        attention_bias: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns `[s, heads x head_dim]`.

        `query`: `[s, heads, head_dim]`. `key`, `value`: `[s, groups, head_dim]`.
        """
        assert attention_mask is None, "attention is causal; no other mask is supported"
        assert attention_bias is None, "not supported"
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        grouped = key.shape[1] != query.shape[1]
        # One split, not slices: the gradient of each slice would be as long as the micro-batch.
        split = (tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value))
        contexts = [
            F.scaled_dot_product_attention(*sequence, is_causal=True, enable_gqa=grouped)
            for sequence in zip(*split, strict=True)
        ]
        return torch.cat([context[0].transpose(0, 1) for context in contexts]).flatten(1)


class RecomputedLayer(TransformerLayer):
    """A layer that keeps only its input and runs again in the backward pass.

    Megatron's own recomputation saves and restores CUDA's random state, which a CPU does not have and which a model
    without dropout does not need.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the layer's own output."""
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def local_block(num_layers: int, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Returns the specification of one stage's layers and final norm."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_norm)
    submodules: Any = layer.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    final_norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)
