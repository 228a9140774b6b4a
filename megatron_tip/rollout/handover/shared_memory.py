"""Buckets of weights in memory that a server on the same GPU or host can open: CUDA IPC, or POSIX shared memory."""

import io
import shutil
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch.multiprocessing import reductions

from megatron_tip.errors import EngineError, OutputError
from megatron_tip.rollout.handover.buckets import WeightBucket

SHARED_MEMORY = "/dev/shm"

_DEVICE_ARGUMENT = 6
"""Place of the device among the arguments of torch's `rebuild_cuda_tensor`."""


def bucket_limit(bucket_bytes: int, model_bytes: int, device: torch.device, *, num_handing: int) -> int:
    """Returns the size of buckets that have room, at most `bucket_bytes`, and no more than the model needs.

    On a CPU they lie in /dev/shm, which containers often limit to 64 MB.

    Args:
        num_handing: ranks that hand buckets over, each with two buffers at a time; rank 0 has one besides.
    """
    needed = min(bucket_bytes, model_bytes)
    if device.type != "cpu":
        return needed
    free = shutil.disk_usage(SHARED_MEMORY).free
    return max(1, min(needed, free // (2 * num_handing + 1)))


def shared_buffer(num_bytes: int, device: torch.device | str) -> Tensor:
    """Returns an empty buffer `[num_bytes]` uint8 on `device` that other processes can open.

    On a CPU it is a file in /dev/shm, which torch's shared-memory manager removes when nobody uses it, also after a
    SIGKILL.

    Raises:
        OutputError: /dev/shm has no space for it. Writing to it would end this process with SIGBUS.
        EngineError: the device has no memory left.
    """
    if torch.device(device).type != "cpu":
        with _sharing_errors():
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < num_bytes:
        raise OutputError(
            f"{SHARED_MEMORY}: expected {num_bytes / 1e6:.0f} MB for a bucket of weights, got {free / 1e6:.0f} MB "
            "free; give the container more shared memory (--shm-size), lower sync.bucket_bytes, or set sync.transport "
            'to "broadcast"'
        )
    with _sharing_errors(), _shared_by_name():
        storage = torch.UntypedStorage._new_shared(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def handles(bucket: WeightBucket, count: int) -> list[str]:
    """Returns `count` handles of a bucket in a shared buffer, each for one process of a server.

    They are, in base64, what SGLang's update_weights_from_tensor takes in its format "flattened_bucket". Each must be
    opened once: torch counts who uses the memory, and on a GPU keeps it until all have let go of it.

    Raises:
        EngineError: the driver does not share the memory, as in some containers.
    """
    content = {"flattened_tensor": bucket.data, "metadata": _metadata(bucket)}
    with _sharing_errors(), _shared_by_name():
        return [b64encode(_pickled(content)).decode() for _ in range(count)]


def _metadata(bucket: WeightBucket) -> list[SimpleNamespace]:
    """Returns where each tensor lies; the server reads the attributes that SGLang's own metadata has."""
    places, start = [], 0
    for name, dtype_name, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        dtype: torch.dtype = getattr(torch, dtype_name)
        end = start + torch.Size(shape).numel() * dtype.itemsize
        places.append(
            SimpleNamespace(
                name=name, shape=torch.Size(shape), dtype=dtype, start_idx=start, end_idx=end, numel=end - start
            )
        )
        start = end
    return places


def _pickled(content: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    pickler = ForkingPickler(stream)
    pickler.dispatch_table = {**pickler.dispatch_table, torch.Tensor: _reduced}
    pickler.dump(content)
    return stream.getvalue()


def _reduced(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Returns torch's reduction of `tensor`, with the GPU's UUID for its number, which differs between processes.

    SGLang's patch of `rebuild_cuda_tensor` accepts it.
    """
    function, arguments = reductions.reduce_tensor(tensor)
    if tensor.is_cuda:
        uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
        arguments = (*arguments[:_DEVICE_ARGUMENT], uuid, *arguments[_DEVICE_ARGUMENT + 1 :])
    return function, arguments


@contextmanager
def _sharing_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # also torch.OutOfMemoryError
        raise EngineError(
            f'sync.transport = "ipc": expected memory that servers can open for a bucket of weights, got: {error}; set '
            'sync.transport = "broadcast" or "folder"'
        ) from error


@contextmanager
def _shared_by_name() -> Iterator[None]:
    """Shares CPU memory by file name within the block: by default torch passes descriptors, only to child processes."""
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)
