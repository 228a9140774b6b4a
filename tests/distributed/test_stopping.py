"""Saves that fail, stops and ends that all ranks must come to alike, in gloo workers."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from megatron_tip.config import Config
from megatron_tip.errors import OutputError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.parallel.stop import StopRequested
from megatron_tip.parallel.watchdog import HangWatchdog
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.ahead import AheadEngine
from megatron_tip.training.checkpoints import writer as checkpoint
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.checkpoints.resume import restore
from megatron_tip.training.checkpoints.writer import Checkpointer
from megatron_tip.training.loop import left_together, run_steps
from megatron_tip.training.run import TrainingRun
from tests.helpers.checkpoints import checkpointer_of, take_step
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

LAYOUT = Layout(2, student=(2, 1))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def save_badly(config: Config, folder: Path) -> list[Any]:
    """A save whose checksums fail on one rank; one whose predecessor cannot be removed; the same step once more."""
    run, files = build_tiny_run(config, ROLLOUTS), CheckpointFiles(folder / "checkpoints")
    take_step(run, 1)
    checkpointer, summed = checkpointer_of(run, files), checkpoint.synced_checksums

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    if dist.get_rank() == 1:
        checkpoint.synced_checksums = broken  # type: ignore[assignment]
    checkpointer.save(RunProgress(step=1))
    with pytest.raises(OutputError, match=r"cannot be written: OSError: .*Input/output error") as failed:
        checkpointer.finish()
    checkpoint.synced_checksums = summed
    found: list[Any] = [files.steps(), str(failed.value)]

    object.__setattr__(files, "prune", broken)
    checkpointer.save(RunProgress(step=2))
    checkpointer.finish()
    manifest = files.step_folder(2) / "manifest.json"
    written = manifest.stat().st_ino
    resumed = Checkpointer(run, checkpointer._recorder, files, run.stop, resumed_step=2)
    resumed.save(RunProgress(step=2))
    resumed.finish()
    return [*found, files.steps(), manifest.stat().st_ino == written]


def test_a_save_is_whole_or_an_error_everywhere_and_never_made_twice(models: Path, tmp_path: Path):
    config = make_config(models, LAYOUT, run={"folder": tmp_path / "run"})
    for before, _, after, is_untouched in run_workers(save_badly, 2, tmp_path, config, tmp_path):
        assert before == []
        assert after == [2]
        assert is_untouched


def save_onto_a_full_disk(config: Config, folder: Path) -> list[str]:
    """What this rank is told: of rank 1's shards that do not fit, and of metadata that rank 0 cannot write."""
    run, files = build_tiny_run(config, ROLLOUTS), CheckpointFiles(folder / "full" / "checkpoints")
    take_step(run, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    told = []
    for step, (rank, method) in enumerate([(1, "write_data"), (0, "finish")], start=1):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == rank:
                patch.setattr(FileSystemWriter, method, full)
            checkpointer = checkpointer_of(run, files)
            checkpointer.save(RunProgress(step=step))
            with pytest.raises(OutputError) as failed:
                checkpointer.finish()
            told.append(str(failed.value))
    assert files.steps() == []
    return told


def test_every_rank_is_told_why_a_save_failed(models: Path, tmp_path: Path):
    config = make_config(models, LAYOUT, run={"folder": tmp_path / "run"})
    for told in run_workers(save_onto_a_full_disk, 2, tmp_path, config, tmp_path):
        assert len(told) == 2
        assert all("OSError: [Errno 28] No space left on device; free space" in message for message in told), told


class BatchEngine(FixedEngine):
    """Answers each batch's own prompts, under the version of the weights that it begins with; notes what it does."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        super().__init__(rollouts)
        self.version = 0
        self.calls: list[tuple[str, int]] = []
        self.release = threading.Event()
        self.release.set()

    def generate(self, prompts: Any, sampling: Any) -> list[Rollout]:
        version = self.version
        self.calls.append((sampling.batch_name, version))
        self.release.wait()
        return [
            replace(rollout, prompt_index=prompt.index, weight_version=version)
            for rollout, prompt in zip(self.rollouts, prompts, strict=True)
        ]

    def update_weights(self, weights: Any, weight_version: int) -> None:
        super().update_weights(weights, weight_version)
        self.calls.append(("sync", weight_version))
        self.version = weight_version


class StepPrompts:
    """Six prompts of its own a step."""

    heldout: tuple[Prompt, ...] = ()
    digest = "steps"
    num_skipped = num_duplicates = num_copies = 0

    def batch(self, step: int) -> list[Prompt]:
        return [Prompt(10 * step + place, "", rollout.prompt_ids) for place, rollout in enumerate(ROLLOUTS)]


def ahead_run(config: Config) -> tuple[TrainingRun, BatchEngine | None]:
    """A run that generates one batch ahead, of an engine that stands for servers."""
    run = build_tiny_run(config, ROLLOUTS)
    rollout = config.rollout.model_copy(update={"ahead": 1, "prompts_per_step": len(ROLLOUTS)})
    run = replace(run, config=config.model_copy(update={"rollout": rollout}))
    if dist.get_rank():
        return run, None
    engine = BatchEngine(ROLLOUTS)
    return with_source(run, AheadEngine(engine), StepPrompts()), engine


def carry_on(run: TrainingRun, progress: RunProgress, resumed_step: int = 0) -> str:
    """Runs to the end or to a stop, and says which."""
    folder = RunFolder(run.config.run.folder)
    folder.path.mkdir(exist_ok=True)
    rank = dist.get_rank()
    watchdog = HangWatchdog(folder.stacks, rank, timeout_seconds=0, on_hang=lambda _: None)
    with run.stop, recorder_of(run, folder) as recorder:
        files = CheckpointFiles(folder.checkpoints)
        checkpointer = Checkpointer(run, recorder, files, run.stop, resumed_step=resumed_step)
        try:
            run_steps(run, recorder, checkpointer, watchdog, progress)
        except StopRequested as request:
            return f"stopped by {request}"
    return "done"


def stop_while_a_batch_is_made_ahead(config: Config) -> list[Any]:
    """Told to stop while the batch of step 3 is generated beside step 2; then continued to the end."""
    run, engine = ahead_run(config)
    if engine is not None:
        ahead = engine_of(run)
        generate, wait = engine.generate, ahead.wait

        def held(prompts: Any, sampling: Any) -> list[Rollout]:
            if sampling.batch_name == "step_000003":
                engine.release.clear()
            return generate(prompts, sampling)

        def interrupted() -> None:
            if not engine.release.is_set():
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            wait()

        engine.generate, ahead.wait = held, interrupted  # type: ignore[method-assign]
    start = time.monotonic()
    first = carry_on(run, RunProgress())
    seconds = time.monotonic() - start
    if engine is not None:
        engine.release.set()
    again, second_engine = ahead_run(config)
    files = CheckpointFiles(config.run.folder / "checkpoints")
    progress, _ = restore(again, files, 2)
    unrecorded = dict(progress.unrecorded or {})
    last = carry_on(again, progress, resumed_step=2)
    return [first, seconds, files.steps(), unrecorded, last, [e.calls for e in (engine, second_engine) if e]]


def test_a_batch_in_flight_is_left_and_made_again_with_the_weights_of_the_checkpoint(models: Path, tmp_path: Path):
    config = make_config(
        models,
        LAYOUT,
        run={"folder": tmp_path / "run"},
        heldout={"num_prompts": 0},
        output={"save_rollouts": True},
        checkpoint={"every_steps": 0},
    )
    results = run_workers(stop_while_a_batch_is_made_ahead, 2, tmp_path, config)
    for first, seconds, steps, unrecorded, last, _ in results:
        assert (first, steps, last) == ("stopped by SIGTERM", [2], "done")
        assert seconds < 30
        assert unrecorded["rollout/staleness_steps"] == 1.0
    before, after = results[0][-1]
    assert before == [("sync", 0), ("step_000001", 0), ("step_000002", 0), ("sync", 1), ("step_000003", 1)]
    # Step 3's batch, which was under way with the weights of step 1, is begun anew with those of step 2.
    assert after == [("sync", 2), ("step_000003", 2), ("step_000004", 2), ("sync", 3), ("sync", 4)]
    taken = [line for step in range(1, 5) for line in rollout_lines(tmp_path / "run", step)]
    assert [line["prompt_index"] for line in taken] == [10 * s + p for s in range(1, 5) for p in range(len(ROLLOUTS))]
    versions = [line["weight_version"] for line in taken[:: len(ROLLOUTS)]]
    assert versions == [0, 0, 2, 2]


def rollout_lines(folder: Path, step: int) -> list[dict[str, Any]]:
    path = folder / "rollouts" / f"step_{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def stop_in_a_step(config: Config) -> list[Any]:
    """A signal that one rank hears while step 2 trains."""
    run = build_tiny_run(config, ROLLOUTS)
    engine = None
    if dist.get_rank() == 0:
        engine = BatchEngine(ROLLOUTS)
        run = with_source(run, engine, StepPrompts())
    else:
        apply = run.student.apply_gradients

        def told(step: int) -> dict[str, float]:
            if step == 2:
                run.stop.received = signal.SIGUSR1
            return apply(step)

        object.__setattr__(run.student, "apply_gradients", told)
    ended = carry_on(run, RunProgress())
    return [ended, engine.calls if engine else []]


def test_a_stop_is_heeded_before_weights_go_to_servers_that_may_be_gone(models: Path, tmp_path: Path):
    config = make_config(models, LAYOUT, run={"folder": tmp_path / "run"}, heldout={"num_prompts": 0})
    (ended, calls), (ended_too, _) = run_workers(stop_in_a_step, 2, tmp_path, config)
    assert ended == ended_too == "stopped by SIGUSR1"
    assert [call for call in calls if call[0] == "sync"] == [("sync", 0), ("sync", 1)]
    files = CheckpointFiles(tmp_path / "run" / "checkpoints")
    assert files.steps() == [2]
    assert "train/loss" in files.read_state(2)["progress"]["unrecorded"]


def leave(folder: Path, is_stop: bool) -> bool:
    """Rank 0 closes its trackers for a second; returns whether this rank left behind it."""
    closed = folder / "closed"
    reason = StopRequested(signal.SIGUSR1) if is_stop else RuntimeError("a fault of one rank")
    try:
        with left_together():
            try:
                raise reason
            finally:
                if dist.get_rank() == 0:
                    time.sleep(1.0)
                    closed.touch()
    except (StopRequested, RuntimeError):
        return closed.exists()
    raise AssertionError("the reason went on")


@pytest.mark.parametrize("is_stop", [True, False], ids=["stop", "fault"])
def test_no_rank_leaves_a_stopped_run_before_the_first_has_closed_its_trackers(tmp_path: Path, is_stop: bool):
    assert run_workers(leave, 2, tmp_path, tmp_path, is_stop) == [True, is_stop]
