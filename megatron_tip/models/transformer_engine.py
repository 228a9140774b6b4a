"""Transformer Engine's layers, and the only check whether it is installed."""

from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_tip.errors import OptionalDependencyError


def has_transformer_engine() -> bool:
    """Returns whether Megatron-Core found a usable Transformer Engine."""
    return gpt_layer_specs.HAVE_TE


def transformer_engine_block(num_layers: int, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Returns the specification of one stage's layers and final norm, as Transformer Engine modules.

    Raises:
        OptionalDependencyError: Transformer Engine is not installed.
    """
    if not has_transformer_engine():
        raise OptionalDependencyError(
            "transformer_impl = transformer_engine: Transformer Engine is not installed; install the extra "
            "megatron_tip[transformer-engine] on a machine with a GPU, or set transformer_impl = local"
        )
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    final_norm: Any = gpt_layer_specs.TENorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)
