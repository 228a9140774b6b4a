"""A stand-in for CUDA that lets unmodified Megatron-Core run on CPU tensors over gloo.

Imported only on machines without a CUDA device. Megatron-Core names that device explicitly:
`torch.cuda.current_device()`, `device="cuda"`, `Tensor.cuda()`, asserts on "torch.cuda.FloatTensor". A
TorchFunctionMode maps these requests to the CPU; Megatron-Core itself is not patched.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CudaOnCpu(TorchFunctionMode):
    """A mode in which every request to torch for a CUDA device gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's gradient clipping and distributed optimizer assert that gradients are CUDA tensors.
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if _is_cuda(kwargs.get("device")):
            kwargs = dict(kwargs, device="cpu")
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def install() -> None:
    """Activates the mode for the rest of the process. Further calls do nothing.

    Raises:
        RuntimeError: the machine has a CUDA device; mapping its requests to the CPU would be silently slow.
    """
    if torch.cuda.is_available():
        raise RuntimeError("cuda_on_cpu.install: expected a machine without a CUDA device; this one has one")
    if getattr(torch.cuda.current_device, "__module__", None) == __name__:
        return
    torch.cuda.current_device = _current_device
    torch.cuda.synchronize = _synchronize
    stream: Any = HostStream()
    torch.cuda.Stream = HostStream  # type: ignore[misc, assignment]
    torch.cuda.current_stream = lambda *_: stream
    torch.cuda.stream = _on_stream  # type: ignore[misc, assignment]
    CudaOnCpu().__enter__()


class HostStream:
    """A CUDA stream, or an event on it, where every operation ends before the next one begins.

    Megatron's dispatcher of tokens to experts makes one for its copies of counts to the host. Megatron-Core 0.19 asks
    for the current one before each gradient reduction.
    """

    def wait_stream(self, _: "HostStream") -> None:
        """Does nothing: there is no queue."""

    def record_event(self) -> "HostStream":
        """Returns an event that has already happened."""
        return self

    def synchronize(self) -> None:
        """Does nothing: there is no queue."""


def _on_stream(_: HostStream) -> AbstractContextManager[None]:
    return nullcontext()


def _current_device() -> str:
    return "cpu"


def _synchronize(*_: Any, **__: Any) -> None:
    return None
