"""The run's folder: refused when it cannot serve, and files that are whole or not there."""

import errno
import json
import math
import os

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError, OutputError
from megatron_tip.files import atomic_write_text
from megatron_tip.observability.run_folder import RunFolder, Sample
from tests.unit.config.test_io import MINIMAL


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_folder_is_created_with_its_parents_and_may_be_created_again(tmp_path):
    folder = RunFolder.create(tmp_path / "runs" / "a")
    assert folder.path.is_dir()
    assert RunFolder.create(folder.path) == folder
    assert list(folder.path.iterdir()) == []


def test_finished_run_is_not_written_over(tmp_path):
    folder = RunFolder.create(tmp_path / "a")
    folder.write_summary({"steps": 1})
    with pytest.raises(ConfigError, match=r"holds a finished run; give another one \(run\.folder="):
        RunFolder.create(folder.path)


def test_place_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"run\.folder: .*a writable folder"):
            RunFolder.create(path)


def test_full_disk_is_found_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(ConfigError, match="No space left on device; free space"):
        RunFolder.create(tmp_path / "a")


def test_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    atomic_write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OutputError, match=r"summary\.json: cannot write: No space left"):
            atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_into_a_folder_that_is_gone(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        atomic_write_text(tmp_path / "gone" / "file", "text")


def test_files_can_be_read_back(tmp_path):
    source = tmp_path / "run.toml"
    source.write_text(MINIMAL)
    config = load_config(source)
    folder = RunFolder.create(tmp_path / "a")
    folder.write_config(config)
    folder.write_samples([Sample("1 + 1?", "é\n", "2"), Sample("2 + 2?", "", "4")])
    folder.write_summary({"steps": 3, "heldout_reverse_kl": {"before": math.nan, "after": 1.5}})
    assert load_config(folder.config) == config
    lines = folder.samples.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "1 + 1?", "before": "é\n", "after": "2"},
        {"prompt": "2 + 2?", "before": "", "after": "4"},
    ]
    summary = json.loads(folder.summary.read_text())
    assert summary == {"steps": 3, "heldout_reverse_kl": {"before": None, "after": 1.5}}
