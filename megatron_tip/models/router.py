"""The router of tokens to experts, with an auxiliary loss that does not depend on the layout."""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Megatron's router; its auxiliary loss is the mean of the micro-batches', weighted by their tokens.

    Megatron weighs a micro-batch's loss by the tokens that this tensor-parallel rank has of it, and leaves the division
    by the step's tokens to the end of the pass, where our loss, whose weights already include it, has none.
    """

    step_tokens: float = 1.0
    """Tokens of the step that go through the model, over all replicas, padding included."""

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: dist.ProcessGroup,
        reduce_group_has_dp: bool = False,
        valid_token_count: int | Tensor | None = None,
    ) -> Tensor:
        """Returns `activation`, whose backward pass adds the gradient of this rank's part of the loss."""
        assert valid_token_count is not None, "given by every kind of auxiliary loss"
        share = valid_token_count * reduce_group.size() / self.step_tokens
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * share)  # pyright: ignore[reportReturnType]


def set_step_tokens(model: torch.nn.Module, num_tokens: int, dp_group: dist.ProcessGroup) -> None:
    """Tells the routers of `model` how many tokens of the step go through it on all replicas together.

    Args:
        num_tokens: this replica's. Collective: one all-reduce of an integer over `dp_group`, if an auxiliary loss is
            in use; otherwise none.
    """
    routers = [module for module in model.modules() if isinstance(module, Router) and module.is_aux_loss_enabled()]
    if not routers:
        return
    total = torch.tensor(num_tokens, dtype=torch.int64, device=next(model.parameters()).device)
    dist.all_reduce(total, group=dp_group)
    for router in routers:
        router.step_tokens = float(total)
