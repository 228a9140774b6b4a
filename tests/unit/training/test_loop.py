"""How a run ends that has updated nothing, and what it takes over from one that was killed."""

from pathlib import Path

import pytest

from megatron_tip.errors import TooManySkips
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.run_lock import RunLock
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.loop import end_without_updates, take_folder
from tests.helpers.training import Layout, make_config


def test_a_run_of_skipped_steps_alone_is_no_success(tmp_path: Path):
    config = make_config(tmp_path, Layout(1))
    progress = RunProgress()
    for _ in range(3):
        progress.take_step({}, is_skipped=True)
    with pytest.raises(TooManySkips, match="none of the 3 steps was finite"):
        end_without_updates(config, progress)
    progress.take_step({}, is_skipped=False)
    progress.take_step({}, is_skipped=True)
    end_without_updates(config, progress)


def test_half_written_files_are_removed_by_the_locks_owner(tmp_path: Path):
    folder, lock = RunFolder(tmp_path), RunLock(tmp_path)
    folder.rollouts.mkdir()
    leftovers = [tmp_path / ".config.toml.partial", folder.rollouts / ".step_1.partial"]
    for path in leftovers:
        path.touch()
    take_folder(folder, lock)
    assert not any(path.exists() for path in leftovers)
    lock.release()
