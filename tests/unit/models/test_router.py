"""Our router in the layers with experts, in each way in which a version of Megatron-Core specifies a layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_tip.models.layers import local_block
from megatron_tip.models.router import Router, use_router


@pytest.mark.parametrize("specified", [ModuleSpec, partial])  # by Megatron-Core 0.16, by 0.19
def test_only_layers_with_experts_get_our_router(specified: Callable[..., Any]):
    nothing: Any = None
    dense, experts = MLPSubmodules(nothing, nothing), MoESubmodules(experts=nothing)
    specs: Any = [
        ModuleSpec(module=object, submodules=_Parts(specified(kind, submodules=submodules)))
        for kind, submodules in ((MLP, dense), (MoELayer, experts))
    ]
    use_router(TransformerBlockSubmodules(layer_specs=specs))
    assert experts.router is Router
    assert not hasattr(dense, "router")


def test_the_installed_megatron_specifies_layers_in_one_of_them():
    block = local_block([0, 4], qk_norm=True)
    use_router(block)
    layers: Any = block.layer_specs
    routers = [_router(layer.submodules.mlp) for layer in layers]
    assert routers == [None, Router]
    others = local_block([4], qk_norm=True).layer_specs
    assert others is not None
    assert _router(others[0].submodules.mlp) is TopKRouter  # Megatron's own specification is untouched


class _Parts:
    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp


def _router(feed_forward: Any) -> Any:
    submodules = getattr(feed_forward, "submodules", None) or feed_forward.keywords["submodules"]
    return getattr(submodules, "router", None)
