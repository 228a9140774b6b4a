"""Layers that need only torch: Megatron's own linear layers with torch's norm, attention and recomputation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tip.models.router import Router


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


def local_block(num_experts: Sequence[int], *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Returns the specification of one stage's layers and final norm.

    `num_experts`: of each layer; 0: an ordinary feed-forward part.
    """
    final_norm: Any = RMSNorm
    kinds = {count: _local_layer(count, qk_norm=qk_norm) for count in set(num_experts)}
    return TransformerBlockSubmodules(layer_specs=[kinds[count] for count in num_experts], layer_norm=final_norm)


def _local_layer(num_experts: int, *, qk_norm: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(num_experts=num_experts or None, normalization="RMSNorm", qk_layernorm=qk_norm)
    submodules: Any = layer.submodules
    if num_experts:
        # The router reads this norm too, so no projection owns it; with Transformer Engine Megatron knows that.
        del submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        submodules.mlp.submodules.router = Router
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
