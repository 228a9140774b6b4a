"""What a run says first, how one ends that has updated nothing, what it takes over from one that was killed."""

import json
import logging
from pathlib import Path

import pytest

from megatron_tip import machine
from megatron_tip.errors import TooManySkips
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.run_lock import RunLock
from megatron_tip.training import loop
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.loop import end_after_skips, end_without_updates, take_folder
from tests.helpers.training import Layout, make_config


def test_a_megatron_that_no_test_runs_with_is_told(tmp_path: Path, monkeypatch, caplog):
    config, plan = make_config(tmp_path, Layout(1)), None
    monkeypatch.setattr(loop, "description_of", lambda *_: ["student: a model"])
    for version, is_tested in {**dict.fromkeys(machine.TESTED_MEGATRON, True), "0.18.0": False}.items():
        caplog.clear()
        monkeypatch.setattr(machine, "version", lambda _, version=version: version)
        with caplog.at_level(logging.INFO):
            loop.log_beginning(config, plan)  # type: ignore[arg-type]
        assert [record.levelname for record in caplog.records] == ["INFO"] if is_tested else ["INFO", "WARNING"]
        assert ("megatron-core 0.18.0 is not among the versions that are tested" in caplog.text) != is_tested


def test_a_run_of_skipped_steps_alone_is_no_success(tmp_path: Path):
    config = make_config(tmp_path, Layout(1))
    progress = RunProgress()
    most = config.fault.max_skipped_steps
    for _ in range(2):  # two starts of the run, each of which ends after the most that may be skipped
        for _ in range(most):
            progress.take_step({}, is_update=False, is_finite=False)
        with pytest.raises(TooManySkips, match=f"not finite {most} steps in a row"):
            end_after_skips(config, progress)
        progress = RunProgress.from_json(json.loads(json.dumps(progress.as_json())))
    progress.take_step({}, is_update=False)  # nothing to supervise
    with pytest.raises(TooManySkips, match=f"none of the {2 * most + 1} steps updated the student"):
        end_without_updates(config, progress)
    progress.take_step({}, is_update=True)
    progress.take_step({}, is_update=False, is_finite=False)
    end_without_updates(config, progress)


def test_a_step_without_tokens_does_not_end_a_row_of_skips(tmp_path: Path):
    config = make_config(tmp_path, Layout(1))
    progress = RunProgress()
    for _ in range(config.fault.max_skipped_steps):
        progress.take_step({}, is_update=False, is_finite=False)
        progress.take_step({}, is_update=False)
    with pytest.raises(TooManySkips):
        end_after_skips(config, progress)


def test_a_checkpoint_that_does_not_count_updates_had_some():
    values = RunProgress(step=2).as_json()
    del values["num_updates"]
    assert RunProgress.from_json(values).num_updates == 2


def test_half_written_files_are_removed_by_the_locks_owner(tmp_path: Path):
    folder, lock = RunFolder(tmp_path), RunLock(tmp_path)
    folder.rollouts.mkdir()
    leftovers = [tmp_path / ".config.toml.partial", folder.rollouts / ".step_1.partial"]
    for path in leftovers:
        path.touch()
    take_folder(folder, lock)
    assert not any(path.exists() for path in leftovers)
    lock.release()
