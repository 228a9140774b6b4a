"""A run that is killed at any moment and started again gives the metrics and weights of one that never was."""

import random
import time
from pathlib import Path

import pytest

from megatron_tip.config import Config
from tests.helpers.runs import Workers, assert_same_run, run_to_end
from tests.helpers.training import make_models, make_pruned_run

NUM_KILLS = 20


def config_of(models: Path, folder: Path) -> Config:
    return make_pruned_run(
        models,
        folder,
        steps=8,
        heldout={"num_samples": 2, "every_steps": 3},
        optimizer={"clip_grad": 1.0},
    )


def wait_for_moment(workers: Workers, folder: Path, draw: random.Random, *, in_save: bool) -> None:
    """Returns at a random moment of the run, from its first import to its last file; or in the middle of a save."""
    deadline = time.monotonic() + draw.uniform(0.0, 3.0)
    while workers.is_alive() and (in_save or time.monotonic() < deadline):
        if in_save and next(folder.glob("checkpoints/.step_*.partial"), None):
            time.sleep(draw.uniform(0.0, 0.02))
            return
        time.sleep(0.001)


@pytest.mark.slow  # twenty starts of a run
def test_twenty_kills_change_nothing(tmp_path: Path):
    models = make_models(tmp_path / "models")
    run_to_end(config_of(models, tmp_path / "undisturbed"), 2, tmp_path / "log")
    draw = random.Random(6)
    kills = finished = 0
    while kills < NUM_KILLS:
        folder = tmp_path / f"killed_{finished}"
        config = config_of(models, folder)
        while not (folder / "summary.json").exists():
            workers = Workers.start(config, 2, tmp_path / "log")
            if kills < NUM_KILLS:
                wait_for_moment(workers, folder, draw, in_save=kills % 4 == 3)
            if kills < NUM_KILLS and workers.is_alive():
                workers.kill()
                kills += 1
            else:
                assert workers.wait() == [0, 0], workers.errors()
        assert_same_run(folder, tmp_path / "undisturbed")
        finished += 1
