"""Stages with different numbers of layers: a step is that of a single process, and checkpoints fit other layouts."""

from pathlib import Path

import pytest

from tests.distributed.test_checkpoint import ROLLOUTS, restore_and_save, save_after_steps
from tests.helpers.distributed import run_workers
from tests.helpers.first_step import DIFFERENT_BY_LAYOUT, Observed, check_equal, observe
from tests.helpers.training import Layout, make_config, make_models

UNEVEN = {"model": {"pipeline_layers": (4, 2)}, "teacher": {"pipeline_layers": (1, 2, 2, 1)}}
LAYOUT = Layout(4, student=(1, 2), teacher=(1, 4))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def test_the_first_step_is_that_of_a_single_process(models: Path, tmp_path: Path) -> None:
    config = make_config(models, Layout(1))
    single: Observed = run_workers(observe, 1, tmp_path / "1", config, ROLLOUTS, timeout_seconds=240)[0]
    config = make_config(models, LAYOUT, **UNEVEN)
    ranks: list[Observed] = run_workers(observe, 4, tmp_path / "4", config, ROLLOUTS, timeout_seconds=240)
    check_equal(ranks, single, (single.loss, single.gradients), but=DIFFERENT_BY_LAYOUT)


def test_a_checkpoint_of_uneven_stages_is_continued_by_even_ones(models: Path, tmp_path: Path) -> None:
    config = make_config(models, LAYOUT, **UNEVEN)
    expected = run_workers(save_after_steps, 4, tmp_path / "4", config, tmp_path / "saved")[0]
    even = make_config(models, Layout(2, student=(1, 2)))
    found = run_workers(restore_and_save, 2, tmp_path / "2", even, tmp_path / "saved", tmp_path / "again")[0]
    for name in ("train/loss", "train/grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
