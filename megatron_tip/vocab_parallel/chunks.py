"""Chunks of rows, whose logits reuse the same memory, and blocks of a chunk that fit a cache."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.vocab_parallel.kernel_choice import KernelSet, triton_kernels
from megatron_tip.vocab_parallel.kernels import NUM_SCRATCH
from megatron_tip.vocab_parallel.partition import VocabPartition
from megatron_tip.vocab_parallel.products import logits_into

# A kernel takes blocks of rows, and scratch memory shaped like the first block (None: allocate); it returns tensors.
Kernel = Callable[..., tuple[Tensor, ...]]

# On a CPU, bytes of one model's float32 logits per chunk: large enough for fast products, small compared with a head.
_CPU_CHUNK_BYTES = 52 * 2**20
# On a GPU, rows per chunk: enough that reading a head costs little next to its product. Fewer if the logits of both
# models, at most 12 bytes a pair, would take more than this share of the memory.
_GPU_CHUNK_ROWS = 2048
_GPU_BYTES_PER_PAIR = 12
_GPU_SHARE = 1 / 16
# Rows that a GPU's matrix products take at a time.
_GPU_TILE_ROWS = 128
# Bytes of one model's logits per block: on a CPU, each core's share stays in its cache.
CPU_BLOCK_BYTES_PER_THREAD = 3 * 2**17
GPU_BLOCK_BYTES = 32 * 2**20


def default_chunk_rows(num_rows: int, num_columns: int, device: torch.device) -> int:
    """Returns rows per chunk for `num_columns` logits per row and model: chunks of about the same size.

    It depends on the device's whole memory, not on what is free of it, because other chunks add up gradients in another
    order: a resumed run must repeat its numbers bit for bit, and the ranks must agree.
    """
    if device.type != "cuda":
        return even_rows(num_rows, max(1, _CPU_CHUNK_BYTES // (4 * num_columns)))
    most = most_rows_on_gpu(num_columns, torch.cuda.get_device_properties(device).total_memory)
    return even_rows(num_rows, most, multiple_of=min(_GPU_TILE_ROWS, most))


def most_rows_on_gpu(num_columns: int, memory_bytes: int) -> int:
    """Returns the largest chunk, a power of two, on a GPU of `memory_bytes` for `num_columns` logits per model."""
    fitting = int(memory_bytes * _GPU_SHARE / (_GPU_BYTES_PER_PAIR * num_columns))
    return min(_GPU_CHUNK_ROWS, 1 << max(fitting.bit_length() - 1, 0))


def even_rows(num_rows: int, most: int, multiple_of: int = 1) -> int:
    """Returns rows per chunk so that as few chunks as `most` rows each allow are of about the same size."""
    num_chunks = max(1, -(-num_rows // most))
    each = max(1, -(-num_rows // num_chunks))
    return -(-each // multiple_of) * multiple_of


def row_ranges(num_rows: int, rows_each: int) -> Iterator[slice]:
    """Yields ranges of at most `rows_each` rows, or one empty range without rows, so that all collectives still run."""
    for start in range(0, max(num_rows, 1), rows_each):
        yield slice(start, min(start + rows_each, num_rows))


class LogitBuffer:
    """Memory for one model's logits of a chunk, reused by every chunk.

    `head`: the `[v, H]` rows of the real ids that this rank owns. With a head of lower precision, the product is
    computed in that precision, as in the model itself, and then cast to float32, unless the kernels read bfloat16.
    """

    def __init__(self, head: Tensor, chunk_rows: int, temperature: float, *, reads_bfloat16: bool = False):
        self._head = head
        self._scale = 1 / temperature
        self._product = head.new_empty(chunk_rows, head.shape[0])
        is_read = head.dtype == torch.float32 or (reads_bfloat16 and head.dtype == torch.bfloat16)
        self._logits = self._product if is_read else self._product.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns `[c, v]` logits / temperature of `[c, H]` hidden states, valid until the next call."""
        product, logits = self._product[: hidden.shape[0]], self._logits[: hidden.shape[0]]
        logits_into(product, hidden, self._head, self._scale)
        return logits if logits.dtype == product.dtype else logits.copy_(product)

    def narrowed(self, grad_logits: Tensor) -> Tensor:
        """Returns `grad_logits` in the head's dtype, reusing the memory of the logits' product."""
        if grad_logits.dtype == self._product.dtype:
            return grad_logits
        return self._product[: grad_logits.shape[0]].copy_(grad_logits)


class RowBlocks:
    """A runner of kernels over `[c, width]` tensors.

    Eager kernels run over blocks of rows, with scratch memory reused by every block: elementwise passes over a whole
    chunk each go through main memory; over a block they stay in the cache. torch.compile and Triton fuse each kernel
    into one pass that needs no scratch; the kernel given to `run` then stands for its namesake.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device, *, kernels: KernelSet = "eager"):
        on_gpu = device.type != "cpu"
        budget = GPU_BLOCK_BYTES if on_gpu else CPU_BLOCK_BYTES_PER_THREAD * torch.get_num_threads()
        is_eager = kernels == "eager"
        fitting = min(num_rows, budget // max(4 * width, 1)) if is_eager else num_rows
        self._block_rows = max(1, fitting)
        self._kernels = kernels
        self._scratch: list[Tensor | None] = [None] * NUM_SCRATCH
        if is_eager:
            memory = torch.empty(NUM_SCRATCH, self._block_rows, width, dtype=torch.float32, device=device)
            self._scratch = list(memory.unbind(0))

    def run(self, kernel: Kernel, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the results of `kernel` for all rows of `tensors`, which share their first dimension."""
        if self._kernels == "triton":
            return getattr(triton_kernels(), kernel.__name__)(*tensors)
        call = _compile(kernel) if self._kernels == "compiled" else kernel
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
    """A range of rows with each model's `[c, v]` logits over the ids of this rank, in float32 or what `blocks` read.

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
