"""A run goes on from a checkpoint as if nothing had been, under its own layout bit for bit, and under any other."""

import random
import threading
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan

from megatron_tip.config import Config
from megatron_tip.conversion import background_save
from megatron_tip.errors import CheckpointError, EngineError, MegatronTipError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.parallel.watchdog import HangWatchdog
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.progress import Heldout, RunProgress
from megatron_tip.training.checkpoints.resume import newest_whole, restore
from megatron_tip.training.checkpoints.writer import Checkpointer
from megatron_tip.training.loop import run_steps
from tests.helpers.checkpoints import checkpointer_of, take_step, weights_of
from tests.helpers.distributed import run_workers
from tests.helpers.first_step import ROLLOUTS
from tests.helpers.training import (
    FixedEngine,
    Layout,
    build_tiny_run,
    make_config,
    make_models,
    recorder_of,
    with_source,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(1).item()]


def held_writing() -> threading.Event:
    """Until it is set, saves of this process write nothing."""
    release, write = threading.Event(), background_save._StagedWriter.write_staged

    def write_when_released(writer: Any) -> None:
        release.wait()
        write(writer)

    background_save._StagedWriter.write_staged = write_when_released  # type: ignore[method-assign]
    return release


def interrupted_and_not(config: Config, folder: Path) -> tuple[list[Any], list[Any]]:
    """Metrics, weights and random draws of four steps: straight on; and saved behind two, on a run built anew."""
    run, files = build_tiny_run(config, ROLLOUTS), CheckpointFiles(folder / "checkpoints")
    checkpointer = checkpointer_of(run, files)
    for step in (1, 2):
        take_step(run, step)
    ratio = run.last_step.adaptive_ratio
    assert ratio is not None
    assert ratio.average is not None
    release = held_writing()
    checkpointer.save(RunProgress(step=2, unrecorded={"a": 1.5}, before=Heldout(float("nan"), ROLLOUTS[:1])))
    straight: list[Any] = [take_step(run, step) for step in (3, 4)]  # while the thread has not yet written
    release.set()
    checkpointer.finish()
    torch.manual_seed(dist.get_rank())
    checkpointer.save(RunProgress(step=4))
    checkpointer.finish()
    straight += [weights_of(run), draws()]

    resumed_run = build_tiny_run(config, ROLLOUTS)
    assert newest_whole(files, resumed_run.device) == 4
    progress, _ = restore(resumed_run, files, 2)
    assert progress.step == 2
    assert resumed_run.last_step.adaptive_ratio == ratio
    assert progress.unrecorded == {"a": 1.5}
    assert progress.before is not None
    assert progress.before.rollouts == ROLLOUTS[:1]
    resumed: list[Any] = [take_step(resumed_run, step) for step in (3, 4)]
    weights = weights_of(resumed_run)
    restore(resumed_run, files, 4)
    return straight, [*resumed, weights, draws()]


@pytest.mark.parametrize(
    "layout,dtype,distributed",
    [
        (Layout(2, student=(2, 1)), "float32", False),
        (Layout(2, student=(1, 2)), "bfloat16", False),
        (Layout(2), "float32", True),
        (Layout(2), "bfloat16", True),
        (Layout(2, cp=(2, 2)), "bfloat16", True),
    ],
    ids=["tp2", "pp2-bf16", "dp2-distributed", "dp2-distributed-bf16", "cp2-distributed-bf16"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(
    models: Path, tmp_path: Path, layout: Layout, dtype: str, distributed: bool
):
    config = make_config(
        models,
        layout,
        model={"dtype": dtype},
        teacher={"dtype": dtype},
        selection={"adaptive_ratio": True},
        optimizer={"distributed": distributed, "clip_grad": 1.0, "weight_decay": 0.1, "warmup_steps": 1},
    )
    for straight, resumed in run_workers(interrupted_and_not, 2, tmp_path, config, tmp_path):
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def extended_and_not(config: Config, longer: Config, folder: Path) -> tuple[list[Any], list[Any]]:
    """Metrics and weights after step 3: of a run that began with all steps of `longer`, and of one extended to them."""
    run = build_tiny_run(longer, ROLLOUTS)
    straight: list[Any] = [take_step(run, step) for step in (1, 2, 3)]
    straight.append(weights_of(run))
    short, files = build_tiny_run(config, ROLLOUTS), CheckpointFiles(folder / "checkpoints")
    extended: list[Any] = [take_step(short, step) for step in (1, 2)]
    checkpointer = checkpointer_of(short, files)
    checkpointer.save(RunProgress(step=2))
    checkpointer.finish()
    resumed = build_tiny_run(longer, ROLLOUTS)
    restore(resumed, files, 2)
    extended += [take_step(resumed, 3), weights_of(resumed)]
    return straight, extended


def test_a_run_that_is_extended_is_the_longer_run_bit_for_bit(models: Path, tmp_path: Path):
    constant = {"lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 1}
    layout = Layout(2, student=(2, 1))
    config, longer = (make_config(models, layout, optimizer=constant, training={"steps": steps}) for steps in (2, 9))
    for straight, extended in run_workers(extended_and_not, 2, tmp_path, config, longer, tmp_path):
        torch.testing.assert_close(extended, straight, rtol=0, atol=0)


def read_of_the_optimizer(config: Config, folder: Path) -> tuple[int, int, int, int]:
    """Restores a run. Bytes of the optimizer: that this rank read, and made room for; all of it; its largest part."""
    run, files = build_tiny_run(config, ROLLOUTS), CheckpointFiles(folder / "checkpoints")
    take_step(run, 1)
    checkpointer = checkpointer_of(run, files)
    checkpointer.save(RunProgress(step=1))
    checkpointer.finish()
    counted: list[int] = []
    read_data = FileSystemReader.read_data

    def read_and_count(reader: Any, plan: LoadPlan, planner: Any) -> Any:
        items = [item for item in plan.items if item.storage_index.fqn.startswith("optimizer.")]
        stored = {index: place.length for index, place in reader.storage_data.items() if "optimizer." in index.fqn}
        read = sum(stored[index] for index in {item.storage_index for item in items})
        room = sum(4 * prod(item.lengths) for item in items)
        counted.extend([read, room, sum(stored.values()), max(stored.values())])
        return read_data(reader, plan, planner)

    FileSystemReader.read_data = read_and_count  # type: ignore[method-assign]
    restore(build_tiny_run(config, ROLLOUTS), files, 1)
    FileSystemReader.read_data = read_data  # type: ignore[method-assign]
    read, room, total, largest = counted
    return read, room, total, largest


def test_each_rank_reads_its_own_part_of_the_distributed_optimizer(models: Path, tmp_path: Path):
    config = make_config(models, Layout(2), optimizer={"distributed": True})
    ranks = run_workers(read_of_the_optimizer, 2, tmp_path, config, tmp_path)
    reads, rooms, (total, _), (largest, _) = zip(*ranks, strict=True)
    assert sum(reads) <= total + 3 * largest, "three states of the parameter that both hold a part of are read twice"
    assert max(reads) <= total / 2 + 3 * largest < total
    assert sum(rooms) <= total, "and room is made for little more than a rank's own elements"


SAVED_LAYOUT = Layout(4, student=(2, 1))


@dataclass(frozen=True)
class Saved:
    """A checkpoint behind two steps, the metrics of the third, and all tensors in the checkpoint."""

    folder: Path
    next_metrics: dict[str, float]
    tensors: dict[str, torch.Tensor]


def save_after_steps(config: Config, folder: Path) -> dict[str, float]:
    run, files = build_tiny_run(config, ROLLOUTS), CheckpointFiles(folder / "checkpoints")
    for step in (1, 2):
        take_step(run, step)
    checkpointer = checkpointer_of(run, files)
    checkpointer.save(RunProgress(step=2))
    checkpointer.finish()
    return take_step(run, 3)


def restore_and_save(config: Config, source: Path, target: Path) -> dict[str, float]:
    """Saves what was restored, unchanged, and returns the metrics of the step that follows."""
    run = build_tiny_run(config, ROLLOUTS)
    progress, _ = restore(run, CheckpointFiles(source / "checkpoints"), 2)
    checkpointer = checkpointer_of(run, CheckpointFiles(target / "checkpoints"))
    checkpointer.save(progress)
    checkpointer.finish()
    return take_step(run, 3)


def plain_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole; without random states, which belong to ranks. Runs in a worker."""
    found = dist_checkpointing.load_plain_tensors(
        str(CheckpointFiles(folder / "checkpoints").step_folder(2) / "shards")
    )
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}


@pytest.mark.parametrize(
    "layout,distributed",
    [
        (Layout(4, student=(2, 2)), False),
        (Layout(1), False),
        (Layout(2, student=(1, 2)), True),
        (Layout(4), True),
        (Layout(4, student=(1, 2), cp=(2, 1)), True),
    ],
    ids=["tp2pp2", "one", "pp2-distributed", "dp4-distributed", "pp2cp2-distributed"],
)
def test_a_checkpoint_is_read_under_any_layout(
    models: Path, tmp_path: Path, saved: dict[bool, Saved], layout: Layout, distributed: bool
):
    optimizer = {"distributed": distributed}
    config = make_config(models, layout, optimizer=optimizer)
    source = saved[distributed]
    metrics = run_workers(restore_and_save, layout.world_size, tmp_path, config, source.folder, tmp_path)[0]
    for name in ("train/loss", "train/grad_norm", "train/lr"):
        assert metrics[name] == pytest.approx(source.next_metrics[name], rel=1e-5), name
    after = run_workers(plain_tensors, 1, tmp_path, tmp_path)[0]
    assert source.tensors.keys() == after.keys()
    for name, tensor in source.tensors.items():
        rows = min(len(tensor), len(after[name])) if "embed" in name or "output_layer" in name else len(tensor)
        assert torch.equal(after[name][:rows], tensor[:rows]), name  # the vocabulary's padding may differ


@pytest.fixture(scope="module")
def saved(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Saved]:
    """A checkpoint of the plain and one of the distributed optimizer."""
    found = {}
    for distributed in (False, True):
        folder = tmp_path_factory.mktemp("saved")
        config = make_config(models, SAVED_LAYOUT, optimizer={"distributed": distributed})
        metrics = run_workers(save_after_steps, 4, folder, config, folder)[0]
        found[distributed] = Saved(folder, metrics, run_workers(plain_tensors, 1, folder, folder)[0])
    return found


def skip_steps(config: Config, folder: Path) -> list[Any]:
    """A step whose teacher is broken before any update, a checkpoint of that, and two steps behind it."""
    run, files = build_tiny_run(config, ROLLOUTS), CheckpointFiles(folder / "checkpoints")
    head = run.teacher.output_head
    before = weights_of(run)
    if head is not None:
        whole = head.clone()
        head.fill_(float("nan"))
    skipped = take_step(run, 1)
    if head is not None:
        head.copy_(whole)
    after = weights_of(run)
    checkpointer = checkpointer_of(run, files)
    checkpointer.save(RunProgress(step=1))
    checkpointer.finish()
    straight = [take_step(run, step) for step in (2, 3)]
    again = build_tiny_run(config, ROLLOUTS)
    restore(again, files, 1)
    return [skipped, before, after, straight, [take_step(again, step) for step in (2, 3)]]


@pytest.mark.parametrize(
    "layout,rule",
    [(Layout(4, student=(1, 2)), "ta_opd_teachability"), (Layout(2, student=(2, 1)), "random")],
    ids=["pp2dp2", "tp2"],
)
def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(
    models: Path, tmp_path: Path, layout: Layout, rule: str
):
    """Under "random" the loss is what is not finite, under a rule that reads statistics those are."""
    config = make_config(models, layout, run={"folder": tmp_path / "run"}, selection={"rule": rule, "compare": False})
    for skipped, before, after, straight, resumed in run_workers(
        skip_steps, layout.world_size, tmp_path, config, tmp_path
    ):
        assert skipped["train/skipped_not_finite"] == 1.0
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert "train/skipped_not_finite" not in straight[0]
        assert resumed == straight
    assert (tmp_path / "run" / "skipped" / "step_000001.jsonl").exists()


class FailingEngine(FixedEngine):
    """Takes no weights of version 2."""

    def update_weights(self, weights: Any, weight_version: int) -> None:
        super().update_weights(weights, weight_version)
        if weight_version == 2:
            raise EngineError("all servers are gone")


def run_into(config: Config, *, broken_head: bool) -> str:
    """What a run ends with whose teacher gives NaN, or whose engine fails; it has saved by then."""
    run, folder = build_tiny_run(config, ROLLOUTS), RunFolder(config.run.folder)
    if broken_head and run.teacher.output_head is not None:
        run.teacher.output_head.fill_(float("nan"))
    if not broken_head:
        run = with_source(run, FailingEngine(ROLLOUTS))
    folder.path.mkdir(exist_ok=True)
    watchdog = HangWatchdog(folder.stacks, dist.get_rank(), timeout_seconds=0, on_hang=lambda _: None)
    with recorder_of(run, folder) as recorder:
        checkpointer = Checkpointer(run, recorder, CheckpointFiles(folder.checkpoints), run.stop)
        try:
            run_steps(run, recorder, checkpointer, watchdog, RunProgress())
        except MegatronTipError as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError("went on to the end")


@pytest.mark.parametrize("broken_head", [True, False], ids=["not_finite", "engine"])
def test_what_all_ranks_meet_alike_ends_the_run_when_it_is_saved(models: Path, tmp_path: Path, broken_head: bool):
    config = make_config(
        models,
        Layout(2, student=(1, 2)),
        run={"folder": tmp_path / "run"},
        heldout={"num_prompts": 0},
        fault={"max_skipped_steps": 2},
    )
    messages = run_workers(partial(run_into, broken_head=broken_head), 2, tmp_path, config)
    files = CheckpointFiles(tmp_path / "run" / "checkpoints")
    assert files.steps() == [2]
    progress = RunProgress.from_json(files.read_state(2)["progress"])
    if broken_head:
        assert all(message.startswith("TooManySkips: step 2: the loss or the gradient") for message in messages)
        assert (progress.unrecorded, progress.skipped_in_a_row, progress.num_updates) == (None, 0, 0)
        assert len(list((tmp_path / "run" / "skipped").iterdir())) == 2
    else:  # the step is taken, its metrics are not yet written
        assert messages == ["EngineError: all servers are gone"] * 2
        assert progress.unrecorded is not None
        assert progress.num_updates == 2
        assert "train/loss" in progress.unrecorded


def restore_with_other_prompts(config: Config, source: Path) -> str:
    run = build_tiny_run(config, ROLLOUTS)
    if run.source is not None:
        run.source.prompts.digest = "others"  # type: ignore[misc]
    with pytest.raises(CheckpointError) as caught:
        restore(run, CheckpointFiles(source / "checkpoints"), 2)
    return str(caught.value)


def test_other_prompts_are_refused_on_every_rank(models: Path, tmp_path: Path, saved: dict[bool, Saved]):
    config = make_config(models, Layout(2))
    for message in run_workers(restore_with_other_prompts, 2, tmp_path, config, saved[False].folder):
        assert "got others under the same settings" in message


def newest_of_damaged(folder: Path) -> list[Any]:
    files, cpu = CheckpointFiles(folder / "checkpoints"), torch.device("cpu")
    found: list[Any] = [newest_whole(files, cpu), newest_whole(files, cpu)]
    for path in files.step_folder(2).rglob("*.distcp") if dist.get_rank() == 0 else ():
        path.unlink()
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints of steps \[2\] is intact") as caught:
        newest_whole(files, cpu)
    return [*found, str(caught.value), newest_whole(CheckpointFiles(folder / "nothing"), cpu)]


def test_the_newest_whole_checkpoint_is_taken_on_every_rank(models: Path, tmp_path: Path):
    config = make_config(models, Layout(2))
    run_workers(save_after_steps, 2, tmp_path, config, tmp_path)
    files = CheckpointFiles(tmp_path / "checkpoints")
    for step in (4, 6):
        partial = files.begin(step)
        files.commit(step, partial, {"shards/lost": (1, "")})
    for found in run_workers(newest_of_damaged, 2, tmp_path, tmp_path):
        assert found[:2] == [2, 2]
        assert found[3] is None
    assert sorted(path.name for path in files.folder.iterdir()) == ["damaged_step_000002", *DAMAGED]


DAMAGED = ["damaged_step_000004", "damaged_step_000006"]
