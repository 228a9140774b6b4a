"""What interrupts a run leaves it whole: told to stop, left by its engine, hung, its newest checkpoint damaged."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_tip.config import Config
from megatron_tip.config.io import dump_config
from megatron_tip.training.checkpoints.files import CheckpointFiles
from tests.helpers.processes import wait_until
from tests.helpers.runs import Workers, assert_same_run, metrics_of, run_to_end
from tests.helpers.tensorboard_files import values_of
from tests.helpers.training import make_models, make_pruned_run
from tests.helpers.wandb_files import finished_records_of, history_of, records_of
from tools.try_faults import try_faults

STEPS = 6


def config_of(models: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    return make_pruned_run(models, folder, steps=STEPS, **sections)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def undisturbed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_to_end(config_of(models, folder), 2, folder.with_name("log"))
    return folder


def started(config: Config, log: Path, *, until_step: int) -> Workers:
    workers = Workers.start(config, 2, log)
    metrics = config.run.folder / "metrics.jsonl"
    wait_until(lambda: (metrics.exists() and len(metrics_of(config.run.folder)) > until_step) or not workers.is_alive())
    return workers


def test_told_to_stop_it_saves_and_continues(models: Path, undisturbed: Path, tmp_path: Path):
    config = config_of(models, tmp_path / "run")
    workers = started(config, tmp_path / "log", until_step=3)
    os.kill(workers.processes[1].pid, signal.SIGUSR1)  # one rank hears it, all stop
    assert workers.wait() == [1, 1]
    assert workers.errors().count("StopRequested: SIGUSR1") == 2
    step = metrics_of(tmp_path / "run")[-1]["step"]
    # Told before the weights go to the engine, the step's metrics are in the checkpoint and not yet in the file.
    assert CheckpointFiles(tmp_path / "run" / "checkpoints").steps()[-1] in (step, step + 1)
    run_to_end(config, 2, tmp_path / "log")
    assert_same_run(tmp_path / "run", undisturbed)


def test_killed_it_leaves_no_gap_in_the_trackers_when_it_continues(models: Path, undisturbed: Path, tmp_path: Path):
    config = config_of(models, tmp_path / "run", tracking={"wandb": "offline", "tensorboard": True})
    workers = started(config, tmp_path / "log", until_step=4)
    for process in psutil.Process(workers.processes[0].pid).children():  # W&B's own, which would otherwise write all
        process.kill()
    workers.kill()
    run_to_end(config, 2, tmp_path / "log")
    steps = [step["step"] for step in metrics_of(tmp_path / "run")]
    assert steps == list(range(STEPS + 1))
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1
    history = [*history_of(records_of(files[0])), *history_of(finished_records_of(files[1]))]
    assert [row["_step"] for row in history] == steps
    files = (tmp_path / "run" / "tensorboard").iterdir()
    losses = {step for path in files for step, value in values_of(path) if value.tag == "train/loss"}
    assert losses == set(steps[1:])
    assert_same_run(tmp_path / "run", undisturbed)


def test_left_by_its_engine_it_saves_and_continues(models: Path, undisturbed: Path, tmp_path: Path):
    batches = shutil.copytree(undisturbed / "rollouts", tmp_path / "batches")
    (batches / "step_000004.jsonl").rename(tmp_path / "missing")
    config = config_of(models, tmp_path / "run", rollout={"engine": "replay", "replay_folder": batches})
    workers = Workers.start(config, 2, tmp_path / "log")
    assert workers.wait() == [1, 1]
    assert "EngineError: replay: " in workers.errors()
    assert CheckpointFiles(tmp_path / "run" / "checkpoints").steps() == [2, 3]
    (tmp_path / "missing").rename(batches / "step_000004.jsonl")
    run_to_end(config, 2, tmp_path / "log")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_rank_that_hangs_ends_the_run_with_stacks(models: Path, undisturbed: Path, tmp_path: Path):
    config = config_of(models, tmp_path / "run", fault={"step_timeout_seconds": 10.0})
    workers = started(config, tmp_path / "log", until_step=3)
    os.kill(workers.processes[1].pid, signal.SIGSTOP)
    workers.processes[0].join()
    workers.processes[1].kill()
    assert workers.processes[0].exitcode == 1
    assert "in _run_steps" in (tmp_path / "run" / "stacks" / "rank_00000.txt").read_text()
    assert "rank 0: error: no step was finished in 10 s" in (tmp_path / "log" / "0.log").read_text()
    run_to_end(config, 2, tmp_path / "log")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(models: Path, undisturbed: Path, tmp_path: Path):
    config = config_of(models, tmp_path / "run")
    files = CheckpointFiles(tmp_path / "run" / "checkpoints")
    workers = Workers.start(config, 2, tmp_path / "log")
    wait_until(lambda: 4 in files.steps() or not workers.is_alive())
    workers.kill()
    shard = max((files.step_folder(4) / "shards").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run_to_end(config, 2, tmp_path / "second")
    assert "the checkpoint of step 4 is damaged (shards/__" in (tmp_path / "second" / "0.log").read_text()
    assert (files.folder / "damaged_step_000004").is_dir()
    assert_same_run(tmp_path / "run", undisturbed)


def test_fresh_begins_anew(models: Path, undisturbed: Path, tmp_path: Path):
    other = config_of(models, tmp_path / "run", selection={"rule": "random"})
    workers = Workers.start(other, 2, tmp_path / "log")
    files = CheckpointFiles(tmp_path / "run" / "checkpoints")
    wait_until(lambda: 2 in files.steps() or not workers.is_alive())
    workers.kill()
    config = config_of(models, tmp_path / "run")
    refused = Workers.start(config, 2, tmp_path / "refused")
    assert refused.wait() == [1, 1]
    assert "selection.rule: 'random', now 'ta_opd_teachability'" in refused.errors()
    workers = Workers.start(config, 2, tmp_path / "log", fresh=True)
    assert workers.wait() == [0, 0], workers.errors()
    assert_same_run(tmp_path / "run", undisturbed)


def test_the_command_that_is_told_to_stop(models: Path, tmp_path: Path):
    """The whole way, through the launcher, by the command that fills docs/reliability.md."""
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config_of(models, tmp_path / "run")))
    (row,) = try_faults(path, ["model.tensor_parallel_size=1"], tmp_path / "faults", ["sigterm"])
    assert row.exit_code == 128 + signal.SIGTERM
    assert row.message.endswith("the run is saved, the same command continues it")
    assert (row.again, row.lost) == (0, [])
