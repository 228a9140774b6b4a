"""What only a GPU can run: buckets of weights that another process opens by CUDA IPC."""

import multiprocessing
import pickle
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_tip.rollout.handover.buckets import weight_buckets
from megatron_tip.rollout.handover.shared_memory import handles, shared_buffer
from tests.helpers.shared_weights import assert_same_tensors, opened

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE_ARGUMENT = 6


def take(handle: str, answer: Connection) -> None:
    """Opens a handle as a server does, whose patch finds the GPU by its UUID, and sends the copied tensors."""
    rebuild = reductions.rebuild_cuda_tensor

    def by_uuid(*arguments: Any) -> torch.Tensor:
        assert arguments[DEVICE_ARGUMENT] == str(torch.cuda.get_device_properties(0).uuid)
        return rebuild(*arguments[:DEVICE_ARGUMENT], 0, *arguments[DEVICE_ARGUMENT + 1 :])

    reductions.rebuild_cuda_tensor = by_uuid
    answer.send_bytes(pickle.dumps({name: tensor.cpu() for name, tensor in opened(handle).items()}))


def test_another_process_opens_what_a_bucket_holds():
    device = torch.device("cuda", 0)
    weights = {"wide": torch.randn(300, 7, device=device), "narrow": torch.randn(50, device=device).bfloat16()}
    new_buffer = partial(shared_buffer, device=device)
    (bucket,) = weight_buckets(iter(weights.items()), 1_000_000, new_buffer, reuse=False)
    (handle,) = handles(bucket, 1)
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=take, args=(handle, theirs), daemon=True)
    process.start()
    assert mine.poll(100), "the other process answers"
    assert_same_tensors(pickle.loads(mine.recv_bytes()), {name: tensor.cpu() for name, tensor in weights.items()})
    process.join()
    torch.cuda.ipc_collect()
