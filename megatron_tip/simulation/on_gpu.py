"""What a simulated rank, whose tensors are the CPU's, does as on a GPU: the sizes of chunks, and Triton's kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_tip.simulation.ledger import Ledger
from megatron_tip.simulation.tensors import tensors_in
from megatron_tip.vocab_parallel import chunks, inputs, kernels
from megatron_tip.vocab_parallel.kernel_choice import KernelSet, KernelSetting

_TILE_ROWS = 128


class FusedKernels:
    """The stand-in for the module of Triton's kernels: each call is one operation that keeps nothing for itself.

    It reads its arguments once, and a gradient also replaces the first one. The results are those of the plain kernels
    of the same names, in float32.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        plain: Callable[..., tuple[Tensor, ...]] = getattr(kernels, name)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self._ledger.paused():
                plain_results = plain(*tensors, [None] * kernels.NUM_SCRATCH)
                results = tuple(result.float() for result in plain_results)
            written = results or tensors[:1]
            work = self._ledger.work[self._ledger.phase]
            work.num_operations += 1
            work.memory_bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *written))
            for tensor in tensors_in(results):
                self._ledger.hold(tensor)
            return results

        return run


@contextmanager
def as_on_gpu(ledger: Ledger, memory_bytes: int) -> Iterator[None]:
    """Makes the arithmetic on logits take the chunks and kernels of a GPU of `memory_bytes`, while the block lasts."""

    def rows(num_rows: int, num_columns: int, device: torch.device) -> int:
        most = chunks.most_rows_on_gpu(num_columns, memory_bytes)
        return chunks.even_rows(num_rows, most, multiple_of=min(_TILE_ROWS, most))

    def chosen(setting: KernelSetting, device: torch.device) -> KernelSet:
        return "eager" if setting == "eager" else "triton"  # compiled kernels, too, take one pass and no scratch

    block_bytes = chunks.GPU_BLOCK_BYTES // torch.get_num_threads()
    with (
        _replaced(inputs, "default_chunk_rows", rows),
        _replaced(inputs, "chosen_kernels", chosen),
        _replaced(inputs, "triton_problem", lambda device: None),
        _replaced(chunks, "triton_kernels", lambda: FusedKernels(ledger)),
        _replaced(chunks, "CPU_BLOCK_BYTES_PER_THREAD", block_bytes),
    ):
        yield


@contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
