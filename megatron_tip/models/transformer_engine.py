"""Transformer Engine's layers, and the only check whether it is installed."""

from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_tip.errors import OptionalDependencyError


def has_transformer_engine() -> bool:
    """Returns whether Megatron-Core found a usable Transformer Engine."""
    return gpt_layer_specs.HAVE_TE


def transformer_engine_block(num_experts: Sequence[int], *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Returns the specification of one stage's layers and final norm, as Transformer Engine modules.

    The experts of a rank are multiplied by one grouped product. `num_experts`: of each layer; 0: an ordinary
    feed-forward part.

    Raises:
        OptionalDependencyError: Transformer Engine is not installed.
    """
    if not has_transformer_engine():
        raise OptionalDependencyError(
            "transformer_impl = transformer_engine: Transformer Engine is not installed; install the extra "
            "megatron_tip[transformer-engine] on a machine with a GPU, or set transformer_impl = local"
        )
    kinds = {count: _layer(count, qk_norm=qk_norm) for count in set(num_experts)}
    final_norm: Any = gpt_layer_specs.TENorm
    return TransformerBlockSubmodules(layer_specs=[kinds[count] for count in num_experts], layer_norm=final_norm)


def _layer(num_experts: int, *, qk_norm: bool) -> ModuleSpec:
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts or None, moe_grouped_gemm=num_experts > 0, qk_layernorm=qk_norm
    )
