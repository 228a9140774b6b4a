"""Experts of a simulated rank: routers whose logits have no values send every expert the same number of tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_tip.models.router import Router
from megatron_tip.simulation.on_gpu import replaced


@contextmanager
def even_routing() -> Iterator[None]:
    """Makes every router do its work and then send token after token to the next experts, while the block lasts.

    Each expert so gets the same number of tokens, as near as it goes. A trained router is less even: the fullest rank
    then has more.
    """
    plain = Router.routing

    def routing(self: Router, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, routing_map = plain(self, *args, **kwargs)
        num_tokens, num_experts = routing_map.shape
        return probs, _even_map(num_tokens, num_experts, self.topk)

    with replaced(Router, "routing", routing):
        yield


def _even_map(num_tokens: int, num_experts: int, num_active: int) -> Tensor:
    """Returns which tokens go to which experts, `[num_tokens, num_experts]`, bool."""
    chosen = torch.arange(num_tokens * num_active).view(num_tokens, num_active) % num_experts
    return torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, chosen, True)
