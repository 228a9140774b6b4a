"""On a simulated GPU a layer's norm and activation are one operation, keep their inputs alone, and stay right."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import mlp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tip.cpu.cuda_on_cpu import CudaOnCpu
from megatron_tip.simulation.ledger import Ledger
from megatron_tip.simulation.on_gpu import as_on_gpu
from megatron_tip.simulation.tensors import CountedTensors

ROWS, WIDTH = 6, 8
PHASE = "build"


@pytest.fixture(params=["plain", "with Megatron on a CPU"], autouse=True)
def stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """A simulated rank runs under the mode that answers Megatron's CUDA calls."""
    with nullcontext() if request.param == "plain" else CudaOnCpu():
        yield


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, [WIDTH], weight, 1e-6)


def swiglu(x: Tensor, weight: Tensor) -> Tensor:
    return mlp.bias_swiglu_impl(x * weight, None, False, False)


def plain_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    gate, value = (x * weight).chunk(2, -1)
    return F.silu(gate) * value


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((ROWS, WIDTH), (WIDTH,)))
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("fused,plain", [(norm, norm), (swiglu, plain_swiglu)], ids=["norm", "swiglu"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_fused_operations_have_the_plain_results_and_gradients(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], recomputed: bool
):
    (x, weight), (own_x, own_weight) = inputs(), inputs()
    expected = plain(x, weight)
    expected.square().sum().backward()
    ledger = Ledger()
    with CountedTensors(ledger), as_on_gpu(ledger, 2**36):
        found = checkpoint(fused, own_x, own_weight, use_reentrant=False) if recomputed else fused(own_x, own_weight)
        found.square().sum().backward()
    assert torch.equal(found, expected)
    assert torch.allclose(own_x.grad, x.grad, rtol=1e-6, atol=1e-7)
    assert torch.allclose(own_weight.grad, weight.grad, rtol=1e-6, atol=1e-7)


def test_a_norm_is_one_operation_each_way_and_keeps_nothing_but_its_inputs():
    x, weight = inputs()
    ledger = Ledger()
    with CountedTensors(ledger), as_on_gpu(ledger, 2**36):
        ledger.assign("inputs", [x, weight])
        found = norm(x, weight)
        work = ledger.work[PHASE]
        assert work.num_operations == 1
        assert work.memory_bytes == 4 * (2 * ROWS * WIDTH + WIDTH)
        assert ledger.live["other"] == 4 * ROWS * WIDTH, "the result"
        found.backward(torch.ones_like(found))
        assert work.num_operations == 2 + 1, "and the gradient that it is given"
    assert sum(peak.total for peak in ledger.peaks.values()) == 4 * (2 * WIDTH + 4 * ROWS * WIDTH)


def test_torch_has_its_own_norm_again_afterwards():
    before = F.rms_norm, mlp.bias_swiglu_impl
    with as_on_gpu(Ledger(), 2**36):
        assert (F.rms_norm, mlp.bias_swiglu_impl) != before
    assert (F.rms_norm, mlp.bias_swiglu_impl) == before
