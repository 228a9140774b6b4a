"""Attention for decoding with grouped queries, without copying keys and values for every query head."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def register_grouped_attention() -> str:
    """Registers this attention with transformers; returns its name (`attn_implementation`)."""
    name = "megatron_tip_grouped"
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns `[b, 1, heads, d]` for one new position; passes anything longer to transformers' own sdpa attention.

    Queries that share a key/value head take the place of query positions, of which there is only one; the mask is the
    same for all heads. `query`: `[b, heads, 1, d]`; `key`, `value`: `[b, kv_heads, s, d]`.
    """
    b, heads, num_positions, d = query.shape
    if num_positions > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped_query = query.reshape(b, key.shape[1], -1, d)
    output = scaled_dot_product_attention(grouped_query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(b, 1, heads, d), None
