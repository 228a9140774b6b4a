import pytest
import torch

from megatron_tip.vocab_parallel import products
from megatron_tip.vocab_parallel.products import add_head_gradient, adds_in_float32

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_remembered():
    adds_in_float32.cache_clear()
    yield
    adds_in_float32.cache_clear()


def add_chunks(dtype: torch.dtype, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over chunks of gradᵀ hidden, and the same in float64."""
    g = torch.Generator().manual_seed(0)
    grads, hidden = torch.randn(chunks, 4, 6, generator=g).to(dtype), torch.randn(chunks, 4, 5, generator=g).to(dtype)
    total = torch.full((6, 5), torch.nan)  # memory that the first chunk finds
    for number in range(chunks):
        add_head_gradient(total, grads[number], hidden[number], first=number == 0)
    return total, torch.einsum("ncv,nch->vh", grads.double(), hidden.double())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_chunks_add_up(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(products, "_HEAD_SLICE", 4)
    total, expected = add_chunks(dtype, 3)
    assert (total - expected).norm() <= tolerance * expected.norm()


def add_as_cuda_does(total, a, b, *, beta):
    total.copy_(torch.addmm(torch.nan_to_num(total) * beta, a.float(), b.float()))


def test_where_products_add_in_float32_nothing_is_rounded(monkeypatch):
    monkeypatch.setattr(products, "_add_in_float32", add_as_cuda_does)
    total, expected = add_chunks(torch.bfloat16, 3)
    assert adds_in_float32(torch.bfloat16, CPU)
    assert (total - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, TypeError])
def test_where_they_do_not_the_sum_is_in_slices(monkeypatch, error):
    def fail(*_, **__):
        raise error("out_dtype")

    monkeypatch.setattr(products, "_add_in_float32", fail)
    assert not adds_in_float32(torch.bfloat16, CPU)
    total, expected = add_chunks(torch.bfloat16, 2)
    assert (total - expected).norm() <= 1e-2 * expected.norm()


def add_with_what_was_there(total, a, b, *, beta):
    total.copy_(total * beta + a.float() @ b.float())  # 0 x NaN is NaN


def add_only_rows(total, a, b, *, beta):
    if len(b):  # without rows, `total` keeps what was there
        add_as_cuda_does(total, a, b, beta=beta)


@pytest.mark.parametrize(
    "add", [lambda total, *_, **__: total.zero_(), add_with_what_was_there, add_only_rows], ids=lambda add: add.__name__
)
def test_a_sum_that_is_wrong_is_not_used(monkeypatch, add):
    monkeypatch.setattr(products, "_add_in_float32", add)
    assert not adds_in_float32(torch.bfloat16, CPU)


def test_torch_takes_the_call():
    """Shapes and types alone, on no device: torch has the product, whatever this machine can run."""
    total, grad = torch.empty(6, 5, device="meta"), torch.empty(4, 6, device="meta", dtype=torch.bfloat16)
    products._add_in_float32(total, grad.T, torch.empty(4, 5, device="meta", dtype=torch.bfloat16), beta=1)
    assert total.shape == (6, 5)
