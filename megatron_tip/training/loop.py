"""The run from its first file to its last."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

import psutil
import torch
import torch.distributed as dist

from megatron_tip.config import Config, FaultConfig
from megatron_tip.errors import EngineError, TooManySkips
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.run_lock import RunLock
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import Worker, destroy_distributed, init_distributed
from megatron_tip.parallel.environment import available_threads, is_restarted
from megatron_tip.parallel.launch import end_worker_with, failures_on_record
from megatron_tip.parallel.stop import StopRequested
from megatron_tip.parallel.together import run_on
from megatron_tip.parallel.watchdog import HangWatchdog
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.models import ends_of_the_teacher_alone
from megatron_tip.planning.plan import RunPlan, plan_run
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.progress import Heldout, RunProgress
from megatron_tip.training.checkpoints.resume import newest_whole, restore
from megatron_tip.training.checkpoints.same_run import check_same_run
from megatron_tip.training.checkpoints.writer import Checkpointer
from megatron_tip.training.finish import finish_run
from megatron_tip.training.heldout import measure_heldout
from megatron_tip.training.recorder import RecorderState, RunRecorder
from megatron_tip.training.run import Gauge, RolloutSource, TrainingRun
from megatron_tip.training.setup import build_run
from megatron_tip.training.step import SKIPPED_NOT_FINITE, train_step
from megatron_tip.training.throughput import Throughput
from megatron_tip.training.weight_sync import update_engine

logger = logging.getLogger(__name__)

MakeGauge = Callable[[Config, RunPlan], Callable[[TrainingRun], Gauge]]
"""Checks from files alone what else is measured, before the first collective; what it returns builds it, at the
student's start."""

LOCK_SECONDS = 180.0
"""NFS gives a dead machine's locks back after 90 s."""

AGREEMENT = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""By the coarser dtype of both models, the reverse KL in nats below which a student has nothing to learn: most likely
it was given as its own teacher.
"""


def train(config: Config, *, fresh: bool = False, make_gauge: MakeGauge | None = None) -> None:
    """Runs `config` as one worker of its world. Every rank calls it; rank 0 writes the run's files.

    An unfinished run in the folder is continued from its newest whole checkpoint; with `fresh` it is removed.

    Args:
        make_gauge: what else is measured; `diagnostics`, which knows banks, lies above.

    Raises:
        MegatronTipError: what a user can mend; before the first collective where it can be known by then.
        StopRequested: a signal ended the run; it is saved.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    plan = plan_run(config, world_size)
    folder = RunFolder.create(config.run.folder)
    if not fresh:
        check_same_run(config)
    build_gauge = make_gauge(config, plan) if make_gauge else None
    worker = init_distributed(timeout_seconds=collective_timeout_seconds(config.fault))
    lock = RunLock(folder.path)
    run_on(0, partial(take_folder, folder, lock), device=worker.device)
    recorder = RunRecorder(config, folder, worker, Throughput.of_run(config, plan, worker))
    timer = PhaseTimer(worker.device, on_enter=recorder.display.show_phase, on_exit=recorder.phase_ended)
    run, progress, recorder.state = run_to_continue(config, plan, worker, timer, folder, build_gauge, fresh=fresh)
    seconds = config.fault.step_timeout_seconds
    with (
        run.stop,  # a signal ends the run between steps or while it generates; it does not interrupt the final writes
        left_together(),  # outside of the recorder, which closes the trackers
        recorder,
    ):
        with (
            recorder.display,
            HangWatchdog(folder.stacks, rank, timeout_seconds=seconds, on_hang=end_worker_with) as watchdog,
            closing(run),
            failures_on_record(),  # innermost: the launcher learns of a failure before the clean-up begins
        ):
            files = CheckpointFiles(folder.checkpoints)
            checkpointer = Checkpointer(run, recorder, files, run.stop, resumed_step=progress.step)
            before, after = run_steps(run, recorder, checkpointer, watchdog, progress)
        finish_run(run, plan, folder, recorder, before, after)
    lock.release()
    destroy_distributed()


def take_folder(folder: RunFolder, lock: RunLock) -> None:
    """Takes the folder's lock, on rank 0, and removes what a killed process left half-written.

    A job that is started again waits as long as a shared file system may keep the lock of a node that died.

    Raises:
        ConfigError: another process has it.
    """
    lock.acquire(wait_seconds=LOCK_SECONDS if is_restarted(os.environ) else 0.0)
    folder.remove_partial_files()


def run_to_continue(
    config: Config,
    plan: RunPlan,
    worker: Worker,
    timer: PhaseTimer,
    folder: RunFolder,
    build_gauge: Callable[[TrainingRun], Gauge] | None,
    *,
    fresh: bool,
) -> tuple[TrainingRun, RunProgress, RecorderState]:
    """Returns the run with where it stood in its newest whole checkpoint; without one, a new run in a cleared folder.

    The gauge is built at the student's start. Collective over the world. Errors as of `newest_whole`, `build_run` and
    `restore`.

    Args:
        fresh: whether to remove what is in the folder first.
    """
    files = CheckpointFiles(folder.checkpoints)
    if worker.rank == 0 and fresh:
        folder.clear()
    step = newest_whole(files, worker.device)
    if worker.rank == 0 and step is None:
        folder.clear()
    dist.barrier()
    start = time.monotonic()
    run = build_run(config, plan, worker, timer, num_threads=config.run.threads or available_threads())
    if build_gauge:
        run = replace(run, gauge=build_gauge(run))
    age = time.time() - psutil.Process().create_time()
    logger.info("models and engine are there after %.1f s, %.1f s into this process", time.monotonic() - start, age)
    if worker.rank == 0 and (ends := ends_of_the_teacher_alone(config, plan.stop_token_ids)):
        logger.warning(
            "the teacher stops at the ids %s and the student does not: its responses go on after them; see "
            "eos_token_id in generation_config.json",
            sorted(ends),
        )
    progress, recorded = RunProgress(), RecorderState()
    if step is not None:
        progress, recorded = restore(run, files, step)
        logger.info("continuing after step %d", step)
    if worker.rank == 0:
        folder.write_config(config)
    return run, progress, recorded


@contextmanager
def left_together() -> Iterator[None]:
    """Holds each rank, when all of them end the run together, until rank 0 has closed its trackers.

    srun and our launcher end every rank as soon as one has left with an exit code that is not 0.
    """
    try:
        yield
    except BaseException as reason:
        if is_shared(reason):
            dist.barrier()
        raise


def is_shared(reason: BaseException) -> bool:
    """Returns whether `reason` ends a run on all ranks, in a state that can be saved."""
    return isinstance(reason, StopRequested | EngineError | TooManySkips)


def collective_timeout_seconds(fault: FaultConfig) -> float:
    """Returns after how long a collective fails: later than the watchdog, which knows more to say."""
    return fault.step_timeout_seconds + 120.0 if fault.step_timeout_seconds else 7 * 24 * 3600.0


def run_steps(
    run: TrainingRun, recorder: RunRecorder, checkpointer: Checkpointer, watchdog: HangWatchdog, progress: RunProgress
) -> tuple[Heldout, Heldout]:
    """Takes all steps that are left; returns the held-out measurements before the first and after the last.

    What ends the run on all ranks, a signal or a failed engine, is raised again once its state is saved. `progress` is
    kept up to date.
    """
    try:
        return _run_steps(run, recorder, checkpointer, watchdog, progress)
    except BaseException as reason:
        if not is_shared(reason):
            raise
        checkpointer.save(progress)
        checkpointer.finish()
        if dist.get_rank() == 0 and progress.step:
            logger.warning("ended by %s; saved after step %d: the same command continues", reason, progress.step)
        raise


def _run_steps(
    run: TrainingRun, recorder: RunRecorder, checkpointer: Checkpointer, watchdog: HangWatchdog, progress: RunProgress
) -> tuple[Heldout, Heldout]:
    """A step: generate, ask, score, select and train, which are `train_step`'s; then sync, record, save.

    A checkpoint is continued with the sync of its weights, after which a step is recorded that was not yet.
    """
    if progress.before is None:
        progress.unrecorded = run.on_source(_prompt_metrics)
    after = _sync_and_record(run, recorder, checkpointer, progress, first=True)
    while progress.step < run.config.training.steps:
        end_after_skips(run.config, progress)
        watchdog.step_done()
        checkpointer.between_steps(progress)
        metrics = train_step(run, progress.step + 1)
        progress.take_step(metrics, is_skipped=SKIPPED_NOT_FINITE in metrics)
        after = _sync_and_record(run, recorder, checkpointer, progress)
    watchdog.step_done()
    checkpointer.finish()
    end_without_updates(run.config, progress)
    assert progress.before is not None, "measured before the first step"
    return progress.before, after or progress.before


def _sync_and_record(
    run: TrainingRun, recorder: RunRecorder, checkpointer: Checkpointer, progress: RunProgress, *, first: bool = False
) -> Heldout | None:
    """Gives the engine the weights of the last step, then records that step; returns its held-out measurement."""
    checkpointer.heed_stop()  # before weights go to servers that the same signal may have ended
    synced = update_engine(run, weight_version=progress.step, first=first)
    if progress.unrecorded is None:
        return None
    progress.unrecorded |= synced
    return record_step(run, recorder, progress)


def record_step(run: TrainingRun, recorder: RunRecorder, progress: RunProgress) -> Heldout:
    """Records the last step, with the held-out measurement if it is due; returns that, or an empty one."""
    assert progress.unrecorded is not None, "something to record"
    step, heldout = progress.step, Heldout(float("nan"), [])
    metrics = progress.unrecorded
    if _measures_after(run.config, step):
        with run.timer.phase("heldout"):
            reverse_kl, rollouts = measure_heldout(run, step)
        heldout = Heldout(reverse_kl, rollouts[: run.config.heldout.num_samples])
        metrics = metrics | {run.teacher.heldout_metric: reverse_kl}
    if run.gauge is not None:
        with run.timer.phase("diagnose"):
            metrics = metrics | run.gauge(step)
    recorder.record(step, metrics | run.timer.step_metrics(), run.views.latest)
    progress.unrecorded = None
    if step == 0:
        progress.before = heldout
        if heldout.reverse_kl < AGREEMENT[Dtypes.of(run.config).coarser]:
            logger.warning(
                "student and teacher agree everywhere (held-out reverse KL %.1e): is teacher.path right?",
                heldout.reverse_kl,
            )
    return heldout


def end_after_skips(config: Config, progress: RunProgress) -> None:
    """Ends a run that is to take another step although too many in a row were not finite.

    Raises:
        TooManySkips: fault.max_skipped_steps of them; on every rank. The count begins anew when the run is continued.
    """
    most = config.fault.max_skipped_steps
    if progress.skipped_in_a_row >= most:
        progress.skipped_in_a_row = 0
        raise TooManySkips(
            f"step {progress.step}: the loss or the gradient was not finite {most} steps in a row "
            f"(fault.max_skipped_steps); their rollouts are in {RunFolder(config.run.folder).skipped}, readable by "
            "the replay engine"
        )


def end_without_updates(config: Config, progress: RunProgress) -> None:
    """Ends a run that took all of its steps and updated nothing in any of them.

    Raises:
        TooManySkips: no step was finite; on every rank.
    """
    if progress.skipped_in_a_row >= progress.step:
        raise TooManySkips(
            f"none of the {progress.step} steps was finite, so that the student is as it was; their rollouts are in "
            f"{RunFolder(config.run.folder).skipped}, readable by the replay engine; start anew with --fresh and other "
            "settings"
        )


def _measures_after(config: Config, step: int) -> bool:
    every = config.heldout.every_steps
    is_due = step in (0, config.training.steps) or (every > 0 and step % every == 0)
    return is_due and config.heldout.num_prompts > 0


def _prompt_metrics(source: RolloutSource) -> dict[str, float]:
    """Returns what was left out of the prompts."""
    return {
        "prompts/num_skipped": float(source.prompts.num_skipped),
        "prompts/num_duplicates": float(source.prompts.num_duplicates),
    }
