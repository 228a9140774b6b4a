"""Layers that need only torch: Megatron's own linear layers with torch's norm, attention and recomputation."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
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


class CausalAttention(torch.nn.Module):
    """Causal attention with torch's fused kernel, which never stores the scores of all pairs of positions.

    Sequences are padded on the right: a causal mask already keeps every valid position from seeing padding.
    """

    def __init__(self, config: TransformerConfig, attn_mask_type: AttnMaskType, **_: Any) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, f"expected causal attention, got {attn_mask_type}"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Tensor:
        """Returns `[s, b, heads x head_dim]`.

        `query`: `[s, b, heads, head_dim]`. `key`, `value`: `[s, b, groups, head_dim]`.
        """
        assert attention_mask is None, "attention is causal; no other mask is supported"
        unsupported = [name for name in ("attention_bias", "packed_seq_params") if options.get(name) is not None]
        assert not unsupported, f"not supported: {unsupported}"
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = key.shape[1] != query.shape[1]
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return context.permute(2, 0, 1, 3).flatten(2)


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
    attention.core_attention = CausalAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    final_norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)
