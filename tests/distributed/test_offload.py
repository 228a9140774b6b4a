"""A run whose teacher and optimizer wait on the host is the run without that, bit for bit, in every layout."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.errors import TrainingError
from megatron_tip.models.host_copy import HostCopy
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.planning.phases import OFFLOADED, PHASES
from megatron_tip.training.checkpoints import distributed_optimizer_state
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.checkpoints.resume import restore
from megatron_tip.training.checkpoints.writer import Checkpointer
from megatron_tip.training.heldout import measure_heldout
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.weight_sync import update_engine
from tests.helpers.checkpoints import take_step
from tests.helpers.distributed import run_workers
from tests.helpers.first_step import ROLLOUTS
from tests.helpers.training import (
    FixedEngine,
    Layout,
    build_tiny_run,
    engine_of,
    make_config,
    make_models,
    recorder_of,
    with_source,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


class PoisonedCopy(HostCopy):
    """While a part is away its tensors are NaN: whatever computes with them shows it."""

    true: list[torch.Tensor]

    def to_host(self) -> int:
        was_away = self._is_on_host
        num_bytes = super().to_host()
        if not was_away:
            self.true = [tensor.data for tensor in self._moving()]
            for tensor in self._moving():
                tensor.data = torch.full_like(tensor, torch.nan)
        return num_bytes

    def to_device(self) -> int:
        if self._is_on_host:
            for tensor, true in zip(self._moving(), self.true, strict=True):
                tensor.data = true
        return super().to_device()


def poison(run: TrainingRun) -> None:
    for name, part in run.memory._parts.items():
        if isinstance(part, HostCopy):
            run.memory._parts[name] = PoisonedCopy(part._tensors, part._device)


def weights_after(run: TrainingRun, steps: Iterable[int], last: int) -> list[Any]:
    found: list[Any] = [take_step(run, step) for step in steps]
    update_engine(run, weight_version=last)
    found.append(measure_heldout(run, last)[0])
    return [*found, getattr(engine_of(run), "weights", {})]


def three_steps(config: Config, poisoned: bool) -> tuple[list[Any], dict[str, float]]:
    run = build_tiny_run(config, ROLLOUTS)
    if poisoned:
        poison(run)
    return weights_after(run, (1, 2, 3), 3), run.memory.step_metrics()


LAYOUTS = [
    (Layout(2, student=(2, 1)), "float32", False),
    (Layout(2, student=(1, 2)), "bfloat16", False),
    (Layout(2), "float32", True),
    (Layout(2), "bfloat16", True),
    (Layout(2), "bfloat16", False),
]
IDS = ["tp2", "pp2-bf16", "dp2-distributed", "dp2-distributed-bf16", "dp2-bf16"]


def config_of(models: Path, layout: Layout, dtype: str, distributed: bool, **sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "model": {"dtype": dtype},
        "teacher": {"dtype": dtype},
        "optimizer": {"distributed": distributed, "clip_grad": 1.0, "weight_decay": 0.1},
    }
    return make_config(models, layout, **values | sections)


def away(config: Config, offload: str) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"offload": offload})})


@pytest.mark.parametrize("layout,dtype,distributed", LAYOUTS, ids=IDS)
def test_a_run_with_everything_away_is_the_same_bit_for_bit(
    models: Path, tmp_path: Path, layout: Layout, dtype: str, distributed: bool
):
    config = config_of(models, layout, dtype, distributed)
    plain = run_workers(three_steps, 2, tmp_path, config, False, timeout_seconds=300.0)
    moved = run_workers(three_steps, 2, tmp_path, away(config, "all"), True, timeout_seconds=300.0)
    for (expected, nothing), (found, metrics) in zip(plain, moved, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert nothing == {}
        for phase in ("ask", "score", "train", "update", "sync", "measure"):
            assert metrics[f"offload/{phase}_seconds"] > 0, phase
        assert metrics["offload/ask_bytes"] > 0
        assert metrics["offload/update_bytes"] > 0, "the optimizer came back"


@pytest.mark.parametrize("offload", ["teacher", "optimizer"])
def test_one_part_alone_and_one_pass(models: Path, tmp_path: Path, offload: str):
    selection = {"retention_ratio": 0.3, "passes": "one"}
    config = config_of(models, Layout(2), "bfloat16", True, selection=selection)
    ((expected, _), _) = run_workers(three_steps, 2, tmp_path, config, False, timeout_seconds=300.0)
    ((found, metrics), _) = run_workers(three_steps, 2, tmp_path, away(config, offload), True, timeout_seconds=300.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(step["train/one_pass"] == 1.0 for step in found[:3])
    assert (metrics["offload/ask_bytes"] > 0) == (offload == "teacher")
    assert metrics["offload/update_bytes"] > 0, "the teacher's head leaves, or the optimizer comes"


def interrupted_and_not(config: Config, folder: Path) -> tuple[list[Any], list[Any]]:
    """Two steps, a save while everything is away, two more; and these two on a run built anew."""
    distributed_optimizer_state.PIECE_NUMEL = 1000  # several pieces, the last of another size
    run, files = build_tiny_run(config, ROLLOUTS), CheckpointFiles(folder / "checkpoints")
    files.folder.parent.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(run, recorder_of(run, RunFolder(folder)), files, run.stop)
    for step in (1, 2):
        take_step(run, step)
    update_engine(run, weight_version=2)
    parts = run.memory._parts
    assert all(part._is_on_host for part in parts.values() if isinstance(part, HostCopy))
    gathered: list[int] = []
    gather = dist.all_gather

    def watched(pieces: list[torch.Tensor], own: torch.Tensor, **arguments: Any) -> Any:
        if own.is_floating_point():
            gathered.append(own.numel())
        return gather(pieces, own, **arguments)

    dist.all_gather = watched
    checkpointer.save(RunProgress(step=2))
    dist.all_gather = gather
    checkpointer.finish()
    if config.optimizer.distributed:
        assert len(gathered) > 10
        assert max(gathered) <= 1000, "no more than a piece on the device"
    straight = weights_after(run, (3, 4), 4)
    resumed = build_tiny_run(config, ROLLOUTS)
    restore(resumed, files, 2)
    return straight, weights_after(resumed, (3, 4), 4)


@pytest.mark.parametrize("layout,dtype,distributed", [LAYOUTS[0], *LAYOUTS[2:4]], ids=[IDS[0], *IDS[2:4]])
def test_a_checkpoint_saved_while_away_continues_exactly(
    models: Path, tmp_path: Path, layout: Layout, dtype: str, distributed: bool
):
    config = away(config_of(models, layout, dtype, distributed), "all")
    plain, _ = run_workers(four_steps, 2, tmp_path, away(config, "none"), timeout_seconds=300.0)
    for straight, resumed in run_workers(interrupted_and_not, 2, tmp_path, config, tmp_path, timeout_seconds=300.0):
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)
        if straight[-1]:
            torch.testing.assert_close(straight[-1], plain, rtol=0, atol=0)


def four_steps(config: Config) -> Any:
    run = build_tiny_run(config, ROLLOUTS)
    return weights_after(run, (1, 2, 3, 4), 4)[-1]


class WatchedEngine(FixedEngine):
    """Notes what servers would be told to hold, among the stages that this rank passes."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__(ROLLOUTS)
        self.events = events

    def generate(self, prompts: Any, sampling: Any) -> Any:
        self.events.append("generate")
        return super().generate(prompts, sampling)

    def update_weights(self, weights: Any, weight_version: int) -> None:
        self.events.append("update_weights")
        super().update_weights(weights, weight_version)

    def hold_memory(self, held: frozenset[str], *, may_start: bool) -> None:
        self.events.append((sorted(held), may_start))


def watched_step(config: Config) -> list[Any]:
    events: list[Any] = []
    run = build_tiny_run(config, ROLLOUTS)
    run.memory._moves_servers = True  # as with SGLang servers beside the trainer
    run = with_source(run, WatchedEngine(events))
    ask, apply = type(run.teacher).ask, type(run.student).apply_gradients
    object.__setattr__(run.teacher, "ask", lambda batch: events.append("ask") or ask(run.teacher, batch))
    object.__setattr__(run.student, "apply_gradients", lambda step: events.append("update") or apply(run.student, step))
    take_step(run, 1)
    update_engine(run, weight_version=1)
    measure_heldout(run, 1)
    return events


def test_servers_give_back_before_the_trainer_needs_it_and_take_before_they_work(models: Path, tmp_path: Path):
    config = make_config(models, Layout(2), training={"offload": "all"})
    events, _ = run_workers(watched_step, 2, tmp_path, config, timeout_seconds=300.0)
    everything, weights, nothing = (["cache", "weights"], True), (["weights"], True), ([], False)
    assert events == [
        *(weights, "update_weights"),
        *(everything, "generate"),
        *(nothing, "ask"),
        *(nothing, nothing, nothing, "update"),  # score, train, update
        *(weights, "update_weights"),
        *(everything, "generate"),
        *((["weights"], False), "ask"),  # the held-out measurement: the weights are still needed
    ]


def fails_on_one(config: Config) -> str:
    run = build_tiny_run(config, ROLLOUTS)
    if dist.get_rank() == 1:

        def refuse() -> int:
            raise TrainingError("no host memory")

        run.memory._parts["teacher"].to_host = refuse  # type: ignore[method-assign]
    try:
        run.enter("sync")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_rank_without_host_memory_ends_all(models: Path, tmp_path: Path):
    config = make_config(models, Layout(2), training={"offload": "teacher"})
    assert run_workers(fails_on_one, 2, tmp_path, config) == ["TrainingError: no host memory"] * 2


def test_the_phases_name_every_part_and_no_other():
    named = {part for phase in PHASES.values() for part in phase.trainer}
    assert named == OFFLOADED["all"] == OFFLOADED["teacher"] | OFFLOADED["optimizer"]
