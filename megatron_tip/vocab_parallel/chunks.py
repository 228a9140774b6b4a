"""Chunks of rows, whose logits reuse the same memory, and blocks of a chunk that fit a cache."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.vocab_parallel.partition import VocabPartition
from megatron_tip.vocab_parallel.products import logits_into

# A kernel takes blocks of rows, and scratch memory shaped like the first block (None: allocate); it returns tensors.
Kernel = Callable[..., tuple[Tensor, ...]]

NUM_SCRATCH = 4

# Bytes of one model's float32 logits per chunk: large enough for fast matrix products, small compared with a head.
_CHUNK_BYTES = 52 * 2**20
# Bytes of one model's logits per block: on a CPU, each core's share stays in its cache.
_CPU_BLOCK_BYTES_PER_THREAD = 3 * 2**17
_GPU_BLOCK_BYTES = 32 * 2**20


def default_chunk_rows(num_rows: int, num_columns: int) -> int:
    """Returns rows per chunk for `num_columns` logits per row: chunks of even size within a byte budget per rank."""
    most = max(1, _CHUNK_BYTES // (4 * num_columns))
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


def row_ranges(num_rows: int, rows_each: int) -> Iterator[slice]:
    """Yields ranges of at most `rows_each` rows, or one empty range without rows, so that all collectives still run."""
    for start in range(0, max(num_rows, 1), rows_each):
        yield slice(start, min(start + rows_each, num_rows))


class LogitBuffer:
    """Memory for one model's float32 logits of a chunk, reused by every chunk.

    `head`: the `[v, H]` rows of the real ids that this rank owns. With a head of lower precision, the product is
    computed in that precision, as in the model itself, and then cast to float32.
    """

    def __init__(self, head: Tensor, chunk_rows: int, temperature: float):
        self._head = head
        self._scale = 1 / temperature
        self._product = head.new_empty(chunk_rows, head.shape[0])
        self._logits = self._product if head.dtype == torch.float32 else self._product.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns `[c, v]` float32 logits / temperature of `[c, H]` hidden states, valid until the next call."""
        product, logits = self._product[: hidden.shape[0]], self._logits[: hidden.shape[0]]
        logits_into(product, hidden, self._head, self._scale)
        return logits if logits.dtype == product.dtype else logits.copy_(product)

    def narrowed(self, grad_logits: Tensor) -> Tensor:
        """Returns `grad_logits` in the head's dtype, reusing the memory of the logits' product."""
        if grad_logits.dtype == self._product.dtype:
            return grad_logits
        return self._product[: grad_logits.shape[0]].copy_(grad_logits)


class RowBlocks:
    """A runner of kernels over blocks of rows of `[c, width]` tensors, with scratch memory reused by every block.

    Elementwise passes over a whole chunk each go through main memory; over a block they stay in the cache.
    `compiled`: torch.compile fuses each kernel into one pass that needs no scratch.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device, *, compiled: bool = False):
        on_gpu = device.type != "cpu"
        budget = _GPU_BLOCK_BYTES if on_gpu else _CPU_BLOCK_BYTES_PER_THREAD * torch.get_num_threads()
        fitting = num_rows if compiled else min(num_rows, budget // max(4 * width, 1))
        self._block_rows = max(1, fitting)
        self._compiled = compiled
        self._scratch: list[Tensor | None] = [None] * NUM_SCRATCH
        if not compiled:
            memory = torch.empty(NUM_SCRATCH, self._block_rows, width, dtype=torch.float32, device=device)
            self._scratch = list(memory.unbind(0))

    def run(self, kernel: Kernel, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the results of `kernel` for all rows of `tensors`, which share their first dimension."""
        call = _compile(kernel) if self._compiled else kernel
        if tensors[0].shape[0] <= self._block_rows:
            return call(*tensors, self._scratch_of(tensors[0].shape[0]))
        splits = zip(*(tensor.split(self._block_rows) for tensor in tensors), strict=True)
        results = [call(*blocks, self._scratch_of(blocks[0].shape[0])) for blocks in splits]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    def _scratch_of(self, rows: int) -> list[Tensor | None]:
        if rows == self._block_rows:
            return self._scratch
        return [memory if memory is None else memory[:rows] for memory in self._scratch]


@dataclass(frozen=True)
class Chunk:
    """A range of rows with each model's `[c, v]` float32 logits over the ids that this rank owns.

    The student comes first. The logits are in `buffers`, may be overwritten, and are valid until the next chunk.
    """

    rows: slice
    logits: tuple[Tensor, ...]
    buffers: tuple[LogitBuffer, ...]
    blocks: RowBlocks
    partition: VocabPartition


@functools.cache
def _compile(kernel: Kernel) -> Kernel:
    return torch.compile(kernel, dynamic=True)
