"""Resuming a run: the choice of its checkpoint, and restoring it."""

import logging
from typing import Any

import torch
import torch.distributed as dist

from megatron_tip.errors import CheckpointError
from megatron_tip.parallel.collectives import broadcast_json, gather_json
from megatron_tip.selection import AdaptiveRatio
from megatron_tip.training.checkpoints.files import SHARDS_NAME, CheckpointFiles
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.checkpoints.same_run import defining_settings
from megatron_tip.training.checkpoints.student_state import load_state
from megatron_tip.training.recorder import RecorderState
from megatron_tip.training.run import TrainingRun

logger = logging.getLogger(__name__)


def identity_of(run: TrainingRun) -> dict[str, Any]:
    """Returns a checkpoint's description of the run that wrote it; the prompts' digest is the first process's."""
    grid = run.student.groups.grid
    return {
        "settings": defining_settings(run.config),
        "layout": grid.sizes(),
        "workers": f"{grid.world_size} {run.device.type}",
        "prompts": run.source.prompts.digest if run.source else "",
    }


def newest_whole(files: CheckpointFiles, device: torch.device) -> int | None:
    """Returns the step of the newest intact checkpoint; None if there never was one.

    Damaged ones are logged and set aside. Every rank checks a part of the files. Collective over the world.

    Raises:
        CheckpointError: on every rank; checkpoints exist, but none is intact.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    steps: list[int] = broadcast_json(files.steps(), source=0, device=device)
    for step in reversed(steps):
        problems = gather_json(files.problem_with(step, part=rank, num_parts=size), device=device)
        found = next((problem for problem in problems if problem), None)
        if found is None:
            return step
        if rank == 0:
            aside = files.set_aside(step)
            logger.warning("the checkpoint of step %d is damaged (%s) and now lies in %s", step, found, aside)
        dist.barrier()
    if steps:
        raise CheckpointError(
            f"{files.folder}: none of the checkpoints of steps {steps} is intact; start over with --fresh, which "
            "removes what is there"
        )
    return None


def restore(run: TrainingRun, files: CheckpointFiles, step: int) -> tuple[RunProgress, RecorderState]:
    """Restores `run` from the checkpoint of `step`; returns its progress. Collective over the world.

    Raises:
        CheckpointError: on every rank; the checkpoint does not fit, or the prompts are not those of the run.
    """
    state = files.read_state(step)
    progress, recorded = read_progress(files, step)
    own = broadcast_json(identity_of(run), source=0, device=run.device)
    if state.get("prompts") != own["prompts"]:
        raise CheckpointError(
            f"prompts: expected those that the run in {files.folder.parent} began with, got others under the same "
            "settings; restore the original file, or start over with --fresh"
        )
    shards = files.step_folder(step) / SHARDS_NAME
    load_state(run.student, run.teacher, shards, with_random_states=state["workers"] == own["workers"])
    run.timer.resume(state["seconds"])
    if state.get("adaptive_ratio") is not None:
        run.last_step.adaptive_ratio = AdaptiveRatio(**state["adaptive_ratio"])
    return progress, recorded


def read_progress(files: CheckpointFiles, step: int) -> tuple[RunProgress, RecorderState]:
    """Returns the progress and the totals in the checkpoint of `step`.

    Raises:
        CheckpointError: they are not those of a run; the same on every rank.
    """
    state = files.read_state(step)
    try:
        return RunProgress.from_json(state["progress"]), RecorderState(**state["recorder"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{files.step_folder(step)}: expected the progress of a run, got {type(error).__name__}: {error}; start "
            "over with --fresh"
        ) from error
