"""The measured peak of a training pass in parts."""

from pathlib import Path

import pytest

from tools.bench_context_parallel import Shape, measure


def test_two_ranks_need_at_most_three_fifths_of_the_memory_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole, part = measure(Shape(num_tokens=2048, num_layers=6, hidden_size=192), [1, 2], tmp_path)
    assert 0.45 * whole.peak_bytes < part.peak_bytes <= 0.6 * whole.peak_bytes
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("| 1 | ")
    assert second.startswith("| 2 | ")
