"""What is allocated, piece by piece: it follows the chunk and not the batch."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_tip.vocab_parallel import (
    DIVERGENCES,
    ShardedVocabulary,
    chunks,
    divergence_loss,
    kernels,
    products,
    token_statistics,
)

VOCAB_SIZE, STUDENT_DIM, TEACHER_DIM, CHUNK_ROWS = 4000, 8, 12, 16
VOCABULARY = ShardedVocabulary(chunk_rows=CHUNK_ROWS)
CHUNK_BYTES = 4 * CHUNK_ROWS * VOCAB_SIZE


@dataclass(frozen=True)
class Allocated:
    """Bytes that torch's CPU allocator handed out: the most at a time above the start, and the largest piece."""

    peak: int
    largest: int


def allocated(num_rows: int, work) -> Allocated:
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(rows, dim, generator=g) for dim in (STUDENT_DIM, TEACHER_DIM) for rows in (num_rows, VOCAB_SIZE)
    ]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work(*tensors)
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
    ]  # what is freed is negative
    return Allocated(max(itertools.accumulate(sizes)), max(sizes))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of two rows and slices of 64 columns: a chunk has many, and what they need is small next to it."""
    monkeypatch.setattr(chunks, "CPU_BLOCK_BYTES_PER_THREAD", 4 * VOCAB_SIZE * 2 // torch.get_num_threads())
    monkeypatch.setattr(products, "_HEAD_SLICE", 64)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_allocates_two_chunks_and_the_gradients_whatever_the_batch(divergence):
    def work(*tensors):
        labels = torch.zeros(len(tensors[0]), dtype=torch.int64)
        divergence_loss(tensors[:2], tensors[2:], VOCABULARY, divergence=divergence, labels=labels).backward()

    few, many = allocated(2 * CHUNK_ROWS, work), allocated(8 * CHUNK_ROWS, work)
    assert many.largest == CHUNK_BYTES
    assert few.peak >= 2 * CHUNK_BYTES, "nothing was counted"
    grad_head, scratch = 4 * VOCAB_SIZE * STUDENT_DIM, kernels.NUM_SCRATCH * 2 * 4 * VOCAB_SIZE
    assert few.peak <= 2 * CHUNK_BYTES + grad_head + scratch + 0.1 * CHUNK_BYTES
    per_row = (many.peak - few.peak) / (6 * CHUNK_ROWS)
    assert per_row <= 4 * 4 * STUDENT_DIM, "bytes a row: a gradient of hidden states and a few scalars"


def test_the_statistics_allocate_two_chunks_whatever_the_batch():
    def work(*tensors):
        token_statistics(tensors[:2], tensors[2:], VOCABULARY, support_size=4, with_jsd=True)

    few, many = allocated(2 * CHUNK_ROWS, work), allocated(8 * CHUNK_ROWS, work)
    assert many.largest == CHUNK_BYTES
    assert few.peak <= 3 * CHUNK_BYTES
    assert (many.peak - few.peak) / (6 * CHUNK_ROWS) <= 4 * 32, "bytes a row: scalars"
