"""What only a GPU can run: host copies in pinned memory."""

import pytest
import torch

from megatron_tip.models.host_copy import HostCopy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_part_waits_in_pinned_memory_and_frees_the_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    large = torch.nn.Parameter(torch.randn(2000, 1000, device=device))
    tensors = [large, torch.randn(7, device=device).bfloat16(), torch.tensor(5.0)]
    values, held = [tensor.detach().cpu() for tensor in tensors], torch.cuda.memory_allocated(device)
    part = HostCopy(lambda: tensors, device)
    for _ in range(2):
        assert part.to_host() == large.nbytes + tensors[1].nbytes
        assert torch.cuda.memory_allocated(device) <= held - large.nbytes
        assert part._buffer is not None
        assert part._buffer.is_pinned()
        assert large.device.type == "cpu"
        assert part.to_device() == large.nbytes + tensors[1].nbytes
        assert tensors[0] is large
        for tensor, value in zip(tensors[:2], values, strict=False):
            assert tensor.device == device
            torch.testing.assert_close(tensor.detach().cpu(), value, rtol=0, atol=0)
