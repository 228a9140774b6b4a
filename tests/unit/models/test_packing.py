from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_tip.models import packing
from megatron_tip.models.packing import boundaries


def boundaries_of(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], *, fused: bool):
    monkeypatch.setattr(packing, "get_model_config", lambda _: SimpleNamespace(apply_rope_fusion=fused))
    return boundaries(torch.nn.Identity(), lengths)


def test_local_layers_get_them_on_the_host(monkeypatch):
    found = boundaries_of(monkeypatch, (3, 1, 5), fused=False)
    assert found.cu_seqlens_q.tolist() == found.cu_seqlens_kv.tolist() == [0, 3, 4, 9]
    assert (found.cu_seqlens_q.dtype, found.max_seqlen_q, found.max_seqlen_kv) == (torch.int32, 5, 5)


def test_fused_layers_get_them_on_the_gpu_without_a_wait(monkeypatch):
    """On no device: a pinned copy that does not block is all that can be seen here."""
    copies, to = [], Tensor.to
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: copies.append(("pinned", tensor.tolist())) or tensor)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *place, **how: copies.append(how) or to(tensor, *place, **how))
    found = boundaries_of(monkeypatch, (3, 1), fused=True)
    assert found.cu_seqlens_q.device.type == "meta"
    pinned, *moved = copies  # moved twice if an earlier test has had Megatron's CUDA calls answered on the CPU
    assert pinned == ("pinned", [0, 3, 4])
    assert moved
    assert all(how == {"non_blocking": True} for how in moved)
