import pytest
import torch

from megatron_tip.vocab_parallel import chunks
from megatron_tip.vocab_parallel.chunks import LogitBuffer, RowBlocks, default_chunk_rows, row_ranges


@pytest.mark.parametrize("num_rows, rows_each", [(0, 4), (1, 4), (8, 4), (9, 4), (3, 100)])
def test_ranges_cover_every_row_once(num_rows, rows_each):
    ranges = list(row_ranges(num_rows, rows_each))
    assert [row for rows in ranges for row in range(rows.start, rows.stop)] == list(range(num_rows))
    assert all(rows.stop - rows.start <= rows_each for rows in ranges)
    assert len(ranges) == max(1, -(-num_rows // rows_each))


@pytest.mark.parametrize("num_rows", [0, 1, 511, 2048, 8192])
@pytest.mark.parametrize("num_columns", [1, 1000, 49_152, 151_936, 10**9])
def test_chunks_keep_to_their_byte_budget(num_rows, num_columns):
    rows = default_chunk_rows(num_rows, num_columns, torch.device("cpu"))
    assert 1 <= rows <= max(num_rows, 1)
    assert rows == 1 or 4 * rows * num_columns <= chunks._CPU_CHUNK_BYTES
    most = max(1, chunks._CPU_CHUNK_BYTES // (4 * num_columns))
    num_chunks = len(list(row_ranges(num_rows, rows)))
    assert num_chunks == len(list(row_ranges(num_rows, most))), "as few as the budget allows"
    assert rows == 1 or len(list(row_ranges(num_rows, rows - 1))) > num_chunks, "shared out evenly"


def test_blocks_see_every_row_once_and_share_scratch(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_BLOCK_BYTES_PER_THREAD", 4 * 5 * 3 // torch.get_num_threads())  # 3 rows of 5
    blocks = RowBlocks(8, 5, torch.device("cpu"))
    values, extra = torch.arange(40.0).view(8, 5), torch.arange(8.0).view(8, 1)
    scratch_seen = set()

    def kernel(z, more, scratch):
        assert all(memory.shape == z.shape for memory in scratch)
        scratch_seen.add(scratch[0].data_ptr())
        assert len(z) <= 3
        return z.sum(-1), torch.mul(z, more, out=scratch[0]).sum(-1)

    sums, products = blocks.run(kernel, values, extra)
    assert torch.equal(sums, values.sum(-1))
    assert torch.equal(products, (values * extra).sum(-1))
    assert len(scratch_seen) == 1


def test_logits_reuse_one_buffer():
    head = torch.randn(7, 3)
    buffer = LogitBuffer(head, 4, temperature=0.5)
    first = torch.randn(4, 3)
    logits = buffer.logits(first)
    torch.testing.assert_close(logits, first @ head.T / 0.5)
    again = buffer.logits(torch.ones(2, 3))
    assert again.data_ptr() == logits.data_ptr()
    assert again.shape == (2, 7)


def test_logits_of_low_precision_are_the_models_own():
    head, hidden = torch.randn(7, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    buffer = LogitBuffer(head, 4, temperature=1.0)
    logits = buffer.logits(hidden)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, (hidden @ head.T).float())
    assert buffer.narrowed(logits).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "num_columns, gib, expected",
    [
        (151_936, 80, 2048),
        (151_936, 40, 1024),  # 2,048 rows of both models would take 3.7 of its 2.5 GB
        (262_144, 80, 1024),
        (151_936 // 8, 24, 2048),
        (10**12, 80, 1),
    ],
)
def test_a_gpu_takes_2048_rows_unless_its_memory_is_small(num_columns, gib, expected):
    assert chunks.most_rows_on_gpu(num_columns, gib * 2**30) == expected


@pytest.mark.parametrize("num_rows, expected", [(0, 128), (1, 128), (2048, 2048), (2049, 1152), (16_000, 2048)])
def test_chunks_on_a_gpu_are_even_and_fill_its_tiles(num_rows, expected, monkeypatch):
    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    rows = default_chunk_rows(num_rows, 151_936, torch.device("cuda"))
    assert rows == expected
    assert len(list(row_ranges(num_rows, rows))) == max(1, -(-num_rows // 2048)), "as few chunks as allowed"


def test_logits_stay_bfloat16_for_kernels_that_read_it():
    head, hidden = torch.randn(7, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    buffer = LogitBuffer(head, 4, temperature=1.0, reads_bfloat16=True)
    logits = buffer.logits(hidden)
    assert torch.equal(logits, hidden @ head.T)
    assert buffer.narrowed(logits).data_ptr() == logits.data_ptr(), "the gradient is used where it is"
    half = LogitBuffer(head.half(), 4, temperature=1.0, reads_bfloat16=True).logits(hidden.half())
    assert half.dtype == torch.float32
