"""The machine: versions, and the roofs that every other figure is measured against."""

import importlib.metadata
import platform
import statistics
import subprocess

import torch
from torch.cuda import nccl

from tools.gpu_checks.task import Task
from tools.meter import seconds_of

_PACKAGES = ("torch", "triton", "transformers", "megatron-core", "transformer-engine", "liger-kernel", "numpy")


def describe(task: Task) -> None:
    """Notes versions, the GPU, copied bytes and operations a second; first that memory can be had at all."""
    task.note(python=platform.python_version(), **{name: _version(name) for name in _PACKAGES})
    device = torch.device(task.device)
    if task.on_gpu:
        found = torch.cuda.get_device_properties(device)
        task.note(
            gpu=found.name,
            capability=f"{found.major}.{found.minor}",
            memory_gib=round(found.total_memory / 2**30, 1),
            multiprocessors=found.multi_processor_count,
            cuda=torch.version.cuda,
            nccl=".".join(map(str, nccl.version())),
            driver=_driver(),
        )
    task.note(copy_tb_per_second=_copied(device, task.size(2**33, 2**24)) / 1e12)
    task.note(bfloat16_tflops=_operations(device, task.size(8192, 256), torch.bfloat16) / 1e12)
    task.note(float32_tflops=_operations(device, task.size(4096, 256), torch.float32) / 1e12)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({error})"


def _copied(device: torch.device, num_bytes: int) -> float:
    """Returns bytes read and written a second by a copy on the device."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * num_bytes / statistics.median(seconds_of(lambda: target.copy_(source), device) for _ in range(5))


def _operations(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Returns operations a second of a square product of random numbers: of zeros it would be faster."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    return 2 * size**3 / statistics.median(seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(7))
