"""Layers that need only torch: Megatron's own linear layers with torch's norm and attention."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tip.models.packing import Boundaries


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

    The kernel never stores the scores of all pairs of positions. One call per sequence, or per chunk of one, computes
    no pair of different sequences and no padding; a mask over the whole micro-batch would cost the square of its
    length.

    Under context parallelism a rank has the queries of its part and gathers the keys and values of all parts: few
    numbers where query heads share them. Transformer Engine, which sends them round in a ring, is faster on GPUs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        attn_mask_type: AttnMaskType,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, f"expected causal attention, got {attn_mask_type}"
        self._cp_group = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Boundaries,
        attention_bias: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns `[s, heads x head_dim]`.

        `query`: `[s, heads, head_dim]`. `key`, `value`: `[s, groups, head_dim]`. Under context parallelism all three
        are this rank's part, `s / cp`; an all-gather over its group forward, a reduce-scatter backward.
        """
        assert attention_mask is None, "attention is causal; no other mask is supported"
        assert attention_bias is None, "not supported"
        if self._cp_group is None:
            contexts = _of_sequences(query, key, value, packed_seq_params)
        else:
            contexts = _of_parts(query, key, value, packed_seq_params, self._cp_group)
        return torch.cat([context[0].transpose(0, 1) for context in contexts]).flatten(1)


def _of_sequences(query: Tensor, key: Tensor, value: Tensor, packed: Boundaries) -> list[Tensor]:
    """Returns the attention of each sequence, `[1, heads, length, head_dim]`."""
    split = (_by_sequence(tensor, packed.lengths) for tensor in (query, key, value))
    return [_attention(*sequence, is_causal=True) for sequence in zip(*split, strict=True)]


def _of_parts(
    query: Tensor, key: Tensor, value: Tensor, packed: Boundaries, cp_group: dist.ProcessGroup
) -> list[Tensor]:
    """Returns the attention of this rank's chunks of each sequence, `[1, heads, chunk, head_dim]`."""
    # Megatron's function for sequence parallelism: its gradient is summed over the group and scattered.
    gathered = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=cp_group)
    ordered = gathered.index_select(0, packed.places_in_parts)
    sizes = [length // (2 * packed.cp_size) for length in packed.lengths]
    queries = _by_sequence(query, [size for size in sizes for _ in packed.chunks])
    contexts = []
    for place, sequence in enumerate(_by_sequence(ordered, packed.lengths)):
        keys, values = sequence.chunk(2, dim=1)
        for chunk, own in zip(packed.chunks, queries[2 * place : 2 * place + 2], strict=True):
            end = (chunk + 1) * sizes[place]
            mask = packed.causal_mask(sizes[place], chunk) if chunk else None
            contexts.append(_attention(own, keys[:, :, :end], values[:, :, :end], mask, is_causal=mask is None))
    return contexts


def _by_sequence(tensor: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Returns `[1, heads, length, head_dim]` for each length, of `[s, heads, head_dim]`.

    One split, not slices: the gradient of each slice would be as long as the micro-batch.
    """
    return tensor.transpose(0, 1)[None].split(list(lengths), dim=2)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, enable_gqa=key.shape[1] != query.shape[1]
    )


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
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
