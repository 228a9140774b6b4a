"""GGUF files that cannot be read; one that can is in the integration tests."""

from pathlib import Path

import pytest

from megatron_tip.conversion.gguf import convert_gguf
from megatron_tip.errors import WeightsError


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a\.gguf: no such file"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "b")


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"no GGUF at all" * 100)
    with pytest.raises(WeightsError, match=r"a\.gguf: transformers cannot read it"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "b")
    assert not (tmp_path / "b").exists()
