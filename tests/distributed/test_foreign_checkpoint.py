"""Checkpoints from anybody: whatever lies in one, loading it runs nothing and ends in a message on every rank."""

import io
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_tip.conversion.megatron_checkpoint import (
    MegatronCheckpoint,
    load_megatron_checkpoint,
    save_megatron_checkpoint,
)
from megatron_tip.errors import CheckpointError, WeightsError
from megatron_tip.planning.plan import plan_run
from megatron_tip.training.checkpoints.files import SHARDS_NAME, CheckpointFiles
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.checkpoints.student_state import load_state
from tests.helpers.checkpoints import checkpointer_of
from tests.helpers.distributed import run_workers
from tests.helpers.first_step import ROLLOUTS
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models

CODE_RAN = "code_ran"


class Attack:
    """A pickle of it makes the folder CODE_RAN."""

    def __reduce__(self) -> Any:
        return os.mkdir, (CODE_RAN,)


def saved_with_torch(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tensor_as_bytes(shards: Path) -> str:
    """The first tensor that a rank loads becomes an entry of bytes, with the size that Megatron looks at."""
    index = read(shards)
    key, tensor = next(
        (key, entry) for key, entry in index.state_dict_metadata.items() if not isinstance(entry, BytesStorageMetadata)
    )
    entry = BytesStorageMetadata()
    entry.size = tensor.size  # type: ignore[attr-defined, union-attr]
    index.state_dict_metadata[key] = entry
    payload = saved_with_torch(Attack())
    (shards / "__9_9.distcp").write_bytes(payload)
    assert index.storage_data is not None
    places = {place: info for place, info in index.storage_data.items() if place.fqn == key}
    info = replace(next(iter(places.values())), relative_path="__9_9.distcp", offset=0, length=len(payload))
    for place in places:
        del index.storage_data[place]
    index.storage_data[replace(next(iter(places)), offset=None, index=None)] = info
    write(shards, index)
    return f"expected {key} to be a tensor, got BytesStorageMetadata"


def tensor_that_is_a_pickle(shards: Path) -> str:
    """Each shard holds a pickle in place of each tensor; torch reads those with weights_only."""
    index = read(shards)
    payload = saved_with_torch(Attack())
    (shards / "__9_9.distcp").write_bytes(payload)
    assert index.storage_data is not None
    for place, info in index.storage_data.items():
        index.storage_data[place] = replace(info, relative_path="__9_9.distcp", offset=0, length=len(payload))
    write(shards, index)
    return "Weights only load failed"


def common_state(shards: Path) -> str:
    (shards / "common.pt").write_bytes(saved_with_torch({"content_metadata": Attack()}))
    return "plain values as a checkpoint's common state"


def old_common_state(shards: Path) -> str:
    """A bare pickle, as torch wrote before its zip files."""
    (shards / "common.pt").write_bytes(pickle.dumps(Attack()))
    return "plain values as a checkpoint's common state"


def zipped_common_state(shards: Path) -> str:
    with zipfile.ZipFile(shards / "common.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Attack()))
        file.writestr("archive/version", "3")
    return "plain values as a checkpoint's common state"


def index_of_a_foreign_class(shards: Path) -> str:
    write(shards, Metadata({"a": Attack()}))  # type: ignore[dict-item]
    return "does not belong in it"


def index_of_something_else(shards: Path) -> str:
    write(shards, {"a": 1})
    return "expected the index of a checkpoint, got dict"


def shards_outside_of_the_folder(shards: Path) -> str:
    index = read(shards)
    assert index.storage_data is not None
    for place, info in index.storage_data.items():
        index.storage_data[place] = replace(info, relative_path=f"../{info.relative_path}")
    write(shards, index)
    return "expected names of files in the same folder"


def shards_elsewhere(shards: Path) -> str:
    index = read(shards)
    assert index.storage_data is not None
    place = next(iter(index.storage_data))
    index.storage_data[place] = replace(index.storage_data[place], relative_path="/etc/passwd")
    write(shards, index)
    return "expected names of files in the same folder"


def read(shards: Path) -> Metadata:
    return pickle.loads((shards / ".metadata").read_bytes())


def write(shards: Path, index: Any) -> None:
    (shards / ".metadata").write_bytes(pickle.dumps(index))


ATTACKS = [
    tensor_as_bytes,
    tensor_that_is_a_pickle,
    common_state,
    old_common_state,
    zipped_common_state,
    index_of_a_foreign_class,
    index_of_something_else,
    shards_outside_of_the_folder,
    shards_elsewhere,
]


def loads_none(models: Path, folder: Path) -> None:
    os.chdir(folder)
    config = make_config(models, Layout(2, student=(2, 1)))
    run = build_tiny_run(config, ROLLOUTS)
    files = CheckpointFiles(folder / "checkpoints")
    checkpointer = checkpointer_of(run, files)
    checkpointer.save(RunProgress(step=1))
    checkpointer.finish()
    source = plan_run(config, 2).student
    save_megatron_checkpoint(run.student.model, source, run.student.groups, folder / "good")
    good = files.step_folder(1) / SHARDS_NAME
    load_state(run.student, run.teacher, good, with_random_states=True)
    is_writer = torch.distributed.get_rank() == 0
    for attack in ATTACKS:
        foreign, weights = folder / "foreign", folder / "weights"
        if is_writer:
            for source_folder, target in ((good, foreign), (folder / "good", weights)):
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source_folder, target)
            (folder / "said.txt").write_text(attack(foreign))
            attack(weights / "weights")
        torch.distributed.barrier()
        expected = (folder / "said.txt").read_text().partition("to be a tensor")[2] or (folder / "said.txt").read_text()
        with pytest.raises(CheckpointError) as resumed:
            load_state(run.student, run.teacher, foreign, with_random_states=True)
        assert expected in str(resumed.value), (attack.__name__, str(resumed.value))
        with pytest.raises(WeightsError) as converted:
            load_megatron_checkpoint(run.student.model, MegatronCheckpoint(weights), run.student.groups)
        assert expected in str(converted.value), (attack.__name__, str(converted.value))
        assert not (folder / CODE_RAN).exists(), attack.__name__
        torch.distributed.barrier()


def test_loading_a_foreign_checkpoint_runs_nothing(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    (tmp_path / "work").mkdir()
    run_workers(loads_none, 2, tmp_path, models, tmp_path / "work", timeout_seconds=240)
