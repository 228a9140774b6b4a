"""Tensors that wait on the host are the same objects with the same values, and their device memory is free."""

import weakref

import pytest
import torch

from megatron_tip.errors import TrainingError
from megatron_tip.models import host_copy
from megatron_tip.models.host_copy import HostCopy

CPU = torch.device("cpu")


def make_tensors() -> list[torch.Tensor]:
    torch.manual_seed(1)
    shapes = [(3, 5), (7,), (0, 4), (1, 1, 9)]
    odd = [torch.randn(shape).to(torch.bfloat16) for shape in shapes]
    return [torch.nn.Parameter(torch.randn(4, 3)), torch.tensor(5.0), *odd, torch.arange(11)]


def test_values_and_identity_survive_the_way_and_back():
    tensors = make_tensors()
    before, alias = [tensor.clone() for tensor in tensors], tensors[0]
    part = HostCopy(lambda: tensors, CPU)
    num_bytes = sum(tensor.nbytes for tensor in tensors if tensor.dim())
    for _ in range(2):
        places = [tensor.data_ptr() for tensor in tensors]
        assert part.to_host() == num_bytes
        assert part.to_host() == 0, "it is there already"
        for tensor, place, expected in zip(tensors, places, before, strict=True):
            torch.testing.assert_close(tensor.data, expected.data, rtol=0, atol=0)
            assert tensor.data_ptr() != place or not tensor.dim() or not tensor.numel()
        buffer = part._buffer
        assert part.to_device() == num_bytes
        assert part.to_device() == 0
        for tensor, expected in zip(tensors, before, strict=True):
            torch.testing.assert_close(tensor.data, expected.data, rtol=0, atol=0)
            assert not _is_within(tensor, buffer), "its memory is its own again"
        assert tensors[0] is alias
        assert isinstance(alias, torch.nn.Parameter)
        assert alias.requires_grad
    assert part._buffer is buffer, "one buffer for all moves"


def _is_within(tensor: torch.Tensor, buffer: torch.Tensor | None) -> bool:
    assert buffer is not None
    return bool(tensor.numel()) and buffer.data_ptr() <= tensor.data_ptr() < buffer.data_ptr() + buffer.nbytes


def test_the_original_memory_is_freed():
    tensors = [torch.randn(1000)]
    storage = weakref.ref(tensors[0].untyped_storage())
    assert storage() is not None
    HostCopy(lambda: tensors, CPU).to_host()
    assert storage() is None


def test_a_view_whose_base_would_keep_its_memory_is_noticed():
    with pytest.raises(AssertionError, match="a view's base"):
        HostCopy(lambda: [torch.randn(1000).view(10, 100)], CPU).to_host()


def test_what_is_created_meanwhile_comes_along_and_what_grew_gets_a_larger_buffer():
    tensors = [torch.randn(5)]
    part = HostCopy(lambda: tensors, CPU)
    part.to_host()
    tensors.append(torch.zeros_like(tensors[0]) + 3)
    assert part.to_device() == 40
    assert part.to_host() == 40
    torch.testing.assert_close(tensors[1], torch.full((5,), 3.0))
    assert all(_is_within(tensor, part._buffer) for tensor in tensors)


def test_writes_on_the_host_are_kept():
    tensors = [torch.zeros(5)]
    part = HostCopy(lambda: tensors, CPU)
    part.to_host()
    tensors[0].fill_(2.0)  # a checkpoint that is loaded
    part.to_device()
    assert tensors[0].tolist() == [2.0] * 5


def test_a_host_without_memory_is_named(monkeypatch: pytest.MonkeyPatch):
    def refuse(buffer: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(host_copy, "_pin", refuse)
    with pytest.raises(TrainingError, match=r"training.offload: expected 0.0 GiB more of host memory .* out of memory"):
        host_copy.host_buffer(1000, torch.device("cuda"))
    assert host_copy.host_buffer(1000, CPU).nbytes == 1000
