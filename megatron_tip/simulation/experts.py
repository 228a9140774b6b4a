"""Experts of a simulated rank: routers whose logits have no values send every expert the same number of tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_tip.models.router import Router
from megatron_tip.simulation.ledger import Ledger
from megatron_tip.simulation.on_gpu import replaced


@contextmanager
def even_routing(ledger: Ledger) -> Iterator[None]:
    """Makes every router do its work and then send token after token to the next experts, while the block lasts.

    Each expert so gets the same number of tokens, as near as it goes. A trained router is less even: the fullest rank
    then has more. `ledger`: counts the map of tokens to experts, but not how it is made.
    """
    plain = Router.routing

    def routing(self: Router, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, routing_map = plain(self, *args, **kwargs)
        with ledger.paused():
            routing_map = _even_map(*routing_map.shape, num_active=self.topk)
        ledger.hold(routing_map)
        return probs, routing_map

    with replaced(Router, "routing", routing):
        yield


def _even_map(num_tokens: int, num_experts: int, *, num_active: int) -> Tensor:
    """Returns which tokens go to which experts, `[num_tokens, num_experts]`, bool."""
    chosen = torch.arange(num_tokens * num_active).view(num_tokens, num_active) % num_experts
    return torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, chosen, True)
