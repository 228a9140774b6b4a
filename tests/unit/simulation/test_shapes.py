"""Results without values are those of torch's fake tensors, whether they are found for the first time or again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron_tip.simulation.ledger import Ledger
from megatron_tip.simulation.tensors import SimulatedTensors

PLACES = torch.tensor([3, 1])
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda x: x @ x.T,
    "view": lambda x: x.view(3, 8)[1:],
    "several views": lambda x: x.split(1, dim=1),
    "chosen rows": lambda x: x[PLACES],
    "masked": lambda x: x.masked_fill(torch.ones(4, 6, dtype=torch.bool), 0.0),
    "top": lambda x: x.topk(2, dim=1),
    "in place": lambda x: x.add_(1),
    "integer and float": lambda x: (x.to(torch.int32) + 1, x.to(torch.int32) + 1.0),
    "norm": lambda x: torch.nn.functional.rms_norm(x, (6,)),
    "transposed": lambda x: x.T.contiguous(),
}


def described(results: Any, x: Tensor) -> list[Any]:
    own = x.untyped_storage()._cdata
    results = [results] if isinstance(results, Tensor) else list(results)
    return [
        (one.shape, one.stride(), one.storage_offset(), one.dtype, one.untyped_storage()._cdata == own, one is x)
        for one in results
    ]


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_torch(name: str):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 6)
        expected = described(CALLS[name](x), x)
    with SimulatedTensors(Ledger()):
        for _ in range(3):
            x = torch.empty(4, 6)
            results = CALLS[name](x)
            assert described(results, x) == expected
            assert all(isinstance(one, FakeTensor) for one in ([results] if isinstance(results, Tensor) else results))


def test_gradients_flow_through_results_that_are_found_again():
    with SimulatedTensors(Ledger()):
        for _ in range(3):
            x = torch.empty(4, 6, requires_grad=True)
            (x.view(3, 8).softmax(dim=1) @ torch.empty(8, 2)).sum().backward()
            assert x.grad is not None
            assert x.grad.shape == (4, 6)


def test_views_keep_one_storage_alive_and_results_have_their_own():
    ledger = Ledger()
    with SimulatedTensors(ledger):
        for _ in range(3):
            x = torch.empty(1000, 10)
            parts = [*x.split(250), x.T, x[:10]]
            del x
            assert sum(ledger.live.values()) == 40000
            more = [part + 1 for part in parts]
            assert sum(ledger.live.values()) == 40000 + sum(4 * part.numel() for part in parts)
            del parts, more
            assert sum(ledger.live.values()) == 0
