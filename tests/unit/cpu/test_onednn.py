"""torch.mm by oneDNN: the same products and gradients, in a process of its own, since the override is for all of it."""

import ctypes
import logging
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
    onednn.onednn_is_faster = lambda: True  # on any processor
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
    onednn.onednn_is_faster = lambda: True
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


def check_torchs_own() -> None:
    onednn.onednn_is_faster = lambda: False
    onednn.onednn_linear = lambda *_: pytest.fail("oneDNN was called")
    onednn.use_faster_products()
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    torch.testing.assert_close(torch.mm(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert not onednn.is_for_onednn(a, b)


def test_torchs_own_products_stay_where_they_are_faster(tmp_path: Path):
    run_workers(check_torchs_own, 1, tmp_path)


INTEL, AMD = "GenuineIntel", "AuthenticAMD"


@pytest.mark.parametrize(
    "vendor, has_mkl, has_onednn, expected",
    [
        (INTEL, True, True, False),
        (AMD, True, True, True),
        ("aarch64", False, True, True),
        (INTEL, False, True, True),
        (AMD, True, False, False),
    ],
)
def test_the_vendor_decides(monkeypatch, tmp_path, vendor, has_mkl, has_onednn, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: some {AMD} or {INTEL}\n" * 2)
    assert onednn.processor_vendor(cpuinfo) == vendor
    monkeypatch.setattr(onednn, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    assert onednn.onednn_is_faster.__wrapped__() is expected


def test_a_processor_without_a_vendors_name_is_known_by_its_architecture(monkeypatch, tmp_path):
    monkeypatch.setattr(onednn.platform, "machine", lambda: "aarch64")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert onednn.processor_vendor(tmp_path / "cpuinfo") == "aarch64"
    assert onednn.processor_vendor(tmp_path / "none") == "aarch64"


def test_the_log_says_which_library_it_is(monkeypatch, caplog):
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(onednn, "processor_vendor", lambda: INTEL)
    with caplog.at_level(logging.INFO):
        assert onednn.use_faster_products.__wrapped__() is None
    assert caplog.messages == ["float32 products on this processor (GenuineIntel) by torch's own library"]


def test_a_context_may_switch_onednn_off(monkeypatch):
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: True)
    ones = torch.ones(2, 2)
    assert onednn.is_for_onednn(ones, ones)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.is_for_onednn(ones, ones)
