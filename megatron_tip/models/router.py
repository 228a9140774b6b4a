"""The router of tokens to experts, with an auxiliary loss that does not depend on the layout of a micro-batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_tip.records import MicroBatch


class Router(TopKRouter):
    """Megatron's router; its auxiliary loss is the mean of the micro-batches', weighted by their tokens.

    Megatron weighs a micro-batch's loss by the tokens that this rank of tp x cp has of it, leaves the division by the
    step's tokens to the end of the pass, where our loss, whose weights already include it, has none, and divides by
    zero where a micro-batch is all padding.
    """

    step_tokens: float = 1.0
    """Tokens of the step that go through the model, over all replicas, without padding."""

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Returns `probs`, whose backward pass adds the gradient of this rank's part of the loss."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        assert with_padding_mask or not coefficient, "only the micro-batch knows which tokens are padding"
        if not coefficient:
            return probs
        tokens_per_expert, _, num_tokens = get_tokens_per_expert_and_token_count(
            routing_map=routing_map, reduce_group=self.tp_cp_group, topk=self.topk, with_padding_mask=True
        )
        divisor: Any = num_tokens.clamp(min=1)  # without tokens the sum over them is 0
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=tokens_per_expert,
            total_num_tokens=divisor,
            topk=self.topk,
            num_experts=routing_map.shape[1],
            moe_aux_loss_coeff=coefficient,
            fused=self.config.moe_router_fusion,
        )
        return MoEAuxLossAutoScaler.apply(probs, loss * num_tokens / self.step_tokens)  # pyright: ignore[reportReturnType]


def use_router(block: TransformerBlockSubmodules) -> None:
    """Makes `Router` the router of every layer of `block` that has experts."""
    layers: Any = block.layer_specs
    for layer in layers:
        feed_forward = layer.submodules.mlp  # a ModuleSpec; from Megatron-Core 0.19 on a partial
        keywords = feed_forward.keywords if isinstance(feed_forward, partial) else vars(feed_forward)
        if isinstance(keywords["submodules"], MoESubmodules):
            keywords["submodules"].router = Router


def forget_probabilities(model: torch.nn.Module) -> None:
    """Makes the dispatchers of `model` forget the router's probabilities as soon as tokens are permuted by them.

    Megatron keeps them until the next micro-batch, and with them the graph that they came from. Of a layer that is
    recomputed, that graph holds all activations: recomputing would save little.
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            dispatcher: Any = layer.token_dispatcher
            dispatcher.dispatch_preprocess = partial(_forgetting, dispatcher, dispatcher.dispatch_preprocess)


def _forgetting(
    dispatcher: Any, permute: Callable[..., Any], hidden_states: Tensor, routing_map: Tensor, probs: Tensor
) -> Any:
    try:
        return permute(hidden_states, routing_map, probs)
    finally:
        dispatcher.probs = probs.new_empty(0)  # only its dtype is read later


def set_auxiliary_loss(model: torch.nn.Module, coefficient: float) -> None:
    """Sets the weight of the auxiliary loss of every router of `model`; 0: none."""
    for module in model.modules():
        if isinstance(module, Router):
            module.config.moe_aux_loss_coeff = coefficient


def set_step_tokens(
    model: torch.nn.Module, micro_batches: Sequence[MicroBatch], dp_cp_group: dist.ProcessGroup
) -> None:
    """Tells the routers of `model` how many tokens of the step go through it on all replicas together.

    Args:
        micro_batches: this rank's parts. Collective: one all-reduce of an integer over `dp_cp_group`, if an auxiliary
            loss is in use; otherwise none.
    """
    routers = [module for module in model.modules() if isinstance(module, Router) and module.is_aux_loss_enabled()]
    if not routers:
        return
    total = torch.stack([(micro_batch.rollout_indices >= 0).sum() for micro_batch in micro_batches]).sum()
    dist.all_reduce(total, group=dp_cp_group)
    for router in routers:
        router.step_tokens = float(total)
