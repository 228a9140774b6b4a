"""Tensors that leave the device for host memory and come back, without a change of identity or value."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tip.errors import TrainingError

_ALIGNMENT = 64
"""Bytes; what torch's own allocators align to, so that a kernel takes the same path on a copy."""
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""


class Movable(Protocol):
    """A part of a model or optimizer that the device need not hold all the time."""

    def to_host(self) -> int:
        """Frees the part's device memory; returns the bytes that were copied to the host. No collective."""
        ...

    def to_device(self) -> int:
        """Brings the part back; returns the bytes that were copied to the device. No collective."""
        ...


class HostCopy:
    """Tensors with one host buffer to move to: `.data` is exchanged, so that every reference sees the values.

    On the host they can be read, by a checkpoint for example, but the device cannot compute with them. On a CPU the
    buffer is ordinary memory and the original is freed all the same. Megatron's own `offload_to_cpu` of an optimizer
    does not serve: it also moves float32 weights, which are views of the model's, and uses no pinned memory.

    Args:
        tensors: called for each move, because an optimizer creates its state late. Scalars, such as the step counts
            that AdamW keeps on the CPU, stay where they are.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._buffer: Tensor | None = None
        self._is_on_host = False

    @torch.no_grad()
    def to_host(self) -> int:
        """Copies the tensors into the buffer and frees the originals; see `Movable`.

        Raises:
            TrainingError: the host has no memory for the buffer.
        """
        if self._is_on_host:
            return 0
        tensors = self._moving()
        ends = [0]
        for tensor in tensors:
            ends.append(ends[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
        if self._buffer is None or self._buffer.nbytes < ends[-1]:
            _unpin(self._buffer, self._device)
            self._buffer = None  # first, so that the host never holds both
            self._buffer = host_buffer(ends[-1], self._device)
        places = [
            self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(tensors, ends[:-1], strict=True)
        ]
        for tensor, place in zip(tensors, places, strict=True):
            place.copy_(tensor, non_blocking=True)
        _synchronize(self._device)
        for tensor, place in zip(tensors, places, strict=True):
            tensor.data = place
        self._is_on_host = True
        return sum(tensor.nbytes for tensor in tensors)

    @torch.no_grad()
    def to_device(self) -> int:
        """Copies the tensors to new device memory, those too that were created meanwhile; see `Movable`."""
        if not self._is_on_host:
            return 0
        tensors = self._moving()
        for tensor in tensors:
            tensor.data = torch.empty_like(tensor, device=self._device).copy_(tensor, non_blocking=True)
        _synchronize(self._device)
        self._is_on_host = False
        return sum(tensor.nbytes for tensor in tensors)

    def _moving(self) -> list[Tensor]:
        found = {id(tensor): tensor for tensor in self._tensors() if tensor.dim()}
        assert all(tensor.is_contiguous() for tensor in found.values()), "a copy keeps the strides"
        assert all(tensor._base is None for tensor in found.values()), "a view's base would keep its memory"
        return list(found.values())


def host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Returns `num_bytes` uninitialised bytes of host memory, uint8; pinned if `device` is a GPU.

    It is registered, not allocated, as pinned memory, as torch's own checkpoints do: torch's pinned allocator rounds up
    to a power of two.

    Raises:
        TrainingError: the host does not have them, or cannot pin them.
    """
    try:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if device.type == "cuda" and num_bytes:
            _pin(buffer)
    except RuntimeError as error:
        raise TrainingError(
            f"training.offload: expected {num_bytes / 2**30:.1f} GiB more of host memory for this rank, got: {error}; "
            'offload less ("teacher" or "optimizer" alone), or raise the job\'s memory and its limit of locked memory'
        ) from error
    return buffer


def _pin(buffer: Tensor) -> None:
    """Registers `buffer` with the driver, until `_unpin`."""
    runtime: Any = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, _PORTABLE)))


def _unpin(buffer: Tensor | None, device: torch.device) -> None:
    """Takes back the registration of a buffer, which must precede the end of its memory."""
    if buffer is not None and buffer.nbytes and device.type == "cuda":
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostUnregister(buffer.data_ptr())))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
