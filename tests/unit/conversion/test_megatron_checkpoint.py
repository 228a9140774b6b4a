"""A checkpoint's index is a pickle: what it may name, and what is refused before anything of it runs."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_tip.conversion.megatron_checkpoint import FORMAT, MegatronCheckpoint
from megatron_tip.errors import WeightsError
from tests.helpers.models import VARIANTS


class Attack:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = VARIANTS["qwen2_tied"].to_dict() | {"architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "megatron_tip.json").write_text(json.dumps({"format": FORMAT}))
    (tmp_path / "weights").mkdir()
    write_index(tmp_path, Metadata({}))
    return tmp_path


def write_index(folder: Path, content: Any) -> None:
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(content))


def test_an_index_of_torchs_records_is_read(folder: Path) -> None:
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([4]))
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([4]), [chunk])
    place = {MetadataIndex("a", [0]): _StorageInfo("__0_0.distcp", 0, 8)}
    write_index(folder, Metadata({"a": tensor, "b": BytesStorageMetadata()}, storage_data=place))
    checkpoint = MegatronCheckpoint(folder)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.architecture.family == "qwen2"


@pytest.mark.parametrize(
    "function,arguments",
    [
        (os.mkdir, ("made",)),
        (os.system, ("mkdir made",)),
        (eval, ("__import__('os').mkdir('made')",)),
        (getattr, (os, "mkdir")),
        (torch.load, ("made",)),
    ],
)
def test_an_index_that_calls_anything_else_is_refused(
    folder: Path, function: Any, arguments: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if function is getattr:
        arguments = (Attack(__import__, "os"), "mkdir")
    write_index(folder, Metadata({"a": Attack(function, *arguments)}))  # pyright: ignore[reportArgumentType]
    with pytest.raises(WeightsError, match="does not belong in it; do not load checkpoints you do not trust"):
        MegatronCheckpoint(folder)
    assert not (folder / "made").exists()


def test_an_index_that_reaches_through_a_permitted_module_is_refused(folder: Path) -> None:
    """Protocol 4 resolves dotted names: torch's own module imports os."""
    payload = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x0amkdir made\x85R."
    (folder / "weights" / ".metadata").write_bytes(payload)
    with pytest.raises(WeightsError, match=r"os\.system does not belong in it"):
        MegatronCheckpoint(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(Metadata({}))[:-5]])
def test_an_index_that_is_broken(folder: Path, content: bytes) -> None:
    (folder / "weights" / ".metadata").write_bytes(content)
    with pytest.raises(WeightsError, match="not the index of a checkpoint"):
        MegatronCheckpoint(folder)


def test_a_folder_that_is_no_checkpoint(folder: Path) -> None:
    (folder / "weights" / ".metadata").unlink()
    with pytest.raises(WeightsError, match="incomplete"):
        MegatronCheckpoint(folder)
    (folder / "megatron_tip.json").write_text('{"format": "another 2"}')
    with pytest.raises(WeightsError, match="another 2"):
        MegatronCheckpoint(folder)
    (folder / "megatron_tip.json").unlink()
    with pytest.raises(WeightsError, match=r"megatron_tip\.json: no such file"):
        MegatronCheckpoint(folder)
