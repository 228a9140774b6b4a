"""Gradients summed in another way, by the distributed optimizer or during the backward pass, take the same step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tip.config import Config
from megatron_tip.records import Rollout
from megatron_tip.training.step import train_step
from megatron_tip.training.weight_sync import update_engine
from tests.helpers.distributed import run_workers
from tests.helpers.first_step import ROLLOUTS
from tests.helpers.training import Layout, build_tiny_run, engine_of, make_config, make_models, make_rollouts


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), tied=request.param)


def weights_after_a_step(config: Config, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
    run = build_tiny_run(config, rollouts)
    train_step(run, 1)
    update_engine(run, weight_version=1)
    return getattr(engine_of(run), "weights", {})


@pytest.mark.parametrize("layout", [Layout(2), Layout(4, student=(2, 1)), Layout(4, cp=(2, 1))], ids=str)
def test_the_distributed_optimizer_takes_the_same_step(models: Path, layout: Layout, tmp_path: Path):
    plain, distributed = (
        run_workers(
            weights_after_a_step,
            layout.world_size,
            tmp_path / str(is_distributed),
            make_config(models, layout, optimizer={"distributed": is_distributed, "clip_grad": 0.5}),
            ROLLOUTS,
        )[0]
        for is_distributed in (False, True)
    )
    torch.testing.assert_close(distributed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "layout, rollouts",
    [
        (Layout(4, student=(1, 2)), ROLLOUTS),
        (Layout(2, cp=(2, 2)), ROLLOUTS),
        (Layout(2), make_rollouts([5])),  # padding alone on one replica
    ],
    ids=["pp2dp2", "cp2", "padding"],
)
@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_that_are_reduced_during_the_backward_pass_are_the_same(
    models: Path, layout: Layout, rollouts: list[Rollout], distributed: bool, tmp_path: Path
):
    """Over two steps: Megatron learns in the first which gradients to wait for."""
    plain, overlapped = (
        run_workers(
            two_steps,
            layout.world_size,
            tmp_path / str(overlaps),
            make_config(models, layout, optimizer={"distributed": distributed, "overlap_grad_reduce": overlaps}),
            rollouts,
        )[0]
        for overlaps in (False, True)
    )
    for one, other in zip(plain, overlapped, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-6), name


def two_steps(config: Config, rollouts: list[Rollout]) -> list[dict[str, float]]:
    """Two steps on the same rollouts; the engine gives them out as if the second weights had made them."""
    run = build_tiny_run(config, rollouts)
    lines = []
    for step in (1, 2):
        if (engine := engine_of(run)) is not None:
            engine.rollouts = [replace(rollout, weight_version=step - 1) for rollout in rollouts]
        lines.append(train_step(run, step))
    return lines


def test_a_step_that_is_not_finite_finishes_the_overlapped_reduction(models: Path, tmp_path: Path):
    optimizer = {"overlap_grad_reduce": True}
    config = make_config(models, Layout(2), optimizer=optimizer, selection={"rule": "random", "compare": False})
    for skipped, after in run_workers(broken_then_whole, 2, tmp_path, config, ROLLOUTS):
        assert skipped["train/skipped_not_finite"] == 1.0
        assert after["train/grad_norm"] > 0


def broken_then_whole(config: Config, rollouts: list[Rollout]) -> list[dict[str, float]]:
    """A step, a step whose teacher is broken, and one behind it; returns the last two."""
    run = build_tiny_run(config, rollouts)
    head = run.teacher.output_head  # type: ignore[attr-defined]
    whole, lines = head.clone(), []
    for step in (1, 2, 3):
        if (engine := engine_of(run)) is not None:
            engine.rollouts = [replace(rollout, weight_version=step - 1) for rollout in rollouts]
        head.copy_(whole) if step != 2 else head.fill_(float("nan"))
        lines.append(train_step(run, step))
    return lines[1:]
