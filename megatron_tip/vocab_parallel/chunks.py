"""Rows in chunks, whose logits exist one chunk at a time in the same memory, and chunks in blocks that fit a cache."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.vocab_parallel.partition import VocabPartition
from megatron_tip.vocab_parallel.products import logits_into

# A kernel takes blocks of rows and scratch memory of the first one's shape (or None: allocate), and returns tensors.
Kernel = Callable[..., tuple[Tensor, ...]]

NUM_SCRATCH = 4

# Bytes of one model's float32 logits of a chunk: large enough for matrix products at full speed, small next to a head.
_CHUNK_BYTES = 52 * 2**20
# Bytes of one model's logits of a block: on a CPU such that a core's share of it stays in its cache.
_CPU_BLOCK_BYTES_PER_THREAD = 3 * 2**17
_GPU_BLOCK_BYTES = 32 * 2**20


def default_chunk_rows(num_rows: int, num_columns: int) -> int:
    """Returns rows per chunk for `num_columns` logits per row: a byte budget per rank, shared evenly by the chunks."""
    most = max(1, _CHUNK_BYTES // (4 * num_columns))
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


def row_ranges(num_rows: int, rows_each: int) -> Iterator[slice]:
    """Yields ranges of at most `rows_each` rows; no rows make one empty range, so that all collectives run."""
    for start in range(0, max(num_rows, 1), rows_each):
        yield slice(start, min(start + rows_each, num_rows))


class LogitBuffer:
    """Memory for one model's float32 logits of a chunk, reused from chunk to chunk.

    `head`: the `[v, H]` rows of the real ids that this rank owns. For a head of lower precision the product is made in
    that precision, as the model itself makes it, and widened.
    """

    def __init__(self, head: Tensor, chunk_rows: int, temperature: float):
        self._head = head
        self._scale = 1 / temperature
        self._product = head.new_empty(chunk_rows, head.shape[0])
        self._logits = self._product if head.dtype == torch.float32 else self._product.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns `[c, v]` float32 logits of `[c, H]` hidden states over the temperature, valid until the next call."""
        product, logits = self._product[: hidden.shape[0]], self._logits[: hidden.shape[0]]
        logits_into(product, hidden, self._head, self._scale)
        return logits if logits.dtype == product.dtype else logits.copy_(product)

    def narrowed(self, grad_logits: Tensor) -> Tensor:
        """Returns `grad_logits` in the head's dtype, in the memory that the logits' product no longer needs."""
        if grad_logits.dtype == self._product.dtype:
            return grad_logits
        return self._product[: grad_logits.shape[0]].copy_(grad_logits)


class RowBlocks:
    """Runs kernels over blocks of rows of `[c, width]` tensors, with scratch memory that is reused from block to block.

    Elementwise passes over a whole chunk go through main memory each; over a block they stay in the cache.
    `compiled`: kernels go through torch.compile, which makes one pass of them and needs no scratch.
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
        """Returns what `kernel` does, for all rows of `tensors`, which share their first dimension."""
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
    """A range of rows with each model's `[c, v]` float32 logits over the ids that this rank owns, to be overwritten.

    Student first. The logits lie in `buffers`, and hold until the next chunk.
    """

    rows: slice
    logits: tuple[Tensor, ...]
    buffers: tuple[LogitBuffer, ...]
    blocks: RowBlocks
    partition: VocabPartition


@functools.cache
def _compile(kernel: Kernel) -> Kernel:
    return torch.compile(kernel, dynamic=True)
