"""A checkpoint whose format cannot be told is refused before its shards are looked at."""

from pathlib import Path

import pytest

from megatron_tip.conversion.tensor_load import load_tensors
from megatron_tip.errors import WeightsError


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "no such file"),
        ('{"sharded_backend": "torch_dist", "novel": 1}', "unexpected keyword argument 'novel'"),
        ("[1]", "expected a checkpoint's format"),
        ("{", "expected a checkpoint's format"),
        ("[" * 200_000, "expected a checkpoint's format"),
    ],
)
def test_the_format_is_checked(tmp_path: Path, content: str | None, expected: str):
    if content is not None:
        (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(WeightsError, match=rf"metadata\.json: .*{expected}|metadata\.json: {expected}"):
        load_tensors({}, tmp_path)
