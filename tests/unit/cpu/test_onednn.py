"""torch.mm by oneDNN: the same products and gradients, in a process of its own, since the override is for all of it."""

import ctypes
from pathlib import Path

import psutil
import pytest
import torch

from megatron_tip.cpu import onednn
from tests.helpers.distributed import run_workers


def gradients(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    product = torch.nn.functional.linear(a, b.t())
    product.square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    return [product.detach(), a.grad, b.grad]


def check() -> None:
    generator = torch.Generator().manual_seed(0)
    calls: list[int] = []
    linear = onednn.onednn_linear

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return linear(*arguments)

    onednn.onednn_linear = counted
    cases = [(torch.randn(2, 5, 7, generator=generator), torch.randn(7, 3, generator=generator))]
    cases += [(torch.randn(n, 7, generator=generator), torch.randn(7, 3, generator=generator)) for n in (0, 1, 33)]
    expected = [gradients(a.double(), b.double()) for a, b in cases]
    onednn.use_faster_products()
    onednn.use_faster_products()
    for (a, b), values in zip(cases, expected, strict=True):
        for got, value in zip(gradients(a, b), values, strict=True):
            torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3 * 3, "forward and both gradients of all but the empty case"
    half = torch.randn(4, 7).bfloat16()
    torch.testing.assert_close(torch.mm(half, half.T), half @ half.T)
    with pytest.raises(RuntimeError, match="shape"):
        torch.mm(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(torch.ones(2, 3), torch.ones(3, 5, dtype=torch.float64))


def kept_memory() -> int:
    """Bytes in use, without what malloc holds back of the freed ones: that differs by machine and by run."""
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def memory_of_many_shapes() -> None:
    onednn.use_faster_products()
    weight = torch.randn(1536, 576)
    torch.mm(torch.randn(2400, 576), weight.t())
    before = kept_memory()
    for rows in range(200, 2400, 20):
        torch.mm(torch.randn(rows, 576), weight.t())
    kept = kept_memory() - before
    assert kept < 30e6, f"{kept / 1e6:.0f} MB are kept for shapes that are gone"  # 7 MB; 70 without the bound


def test_shapes_that_come_and_go_leave_no_memory_behind(tmp_path: Path):
    run_workers(memory_of_many_shapes, 1, tmp_path)


def test_products_and_gradients_are_those_of_float64(tmp_path: Path):
    run_workers(check, 1, tmp_path)
