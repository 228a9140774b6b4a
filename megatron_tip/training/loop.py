"""The whole run, from start or resume to the final files."""

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

from megatron_tip.config import Config
from megatron_tip.errors import EngineError, TooManySkips
from megatron_tip.machine import untested_megatron
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.run_lock import RunLock
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import Worker, destroy_distributed, init_distributed
from megatron_tip.parallel.environment import available_threads, is_restarted
from megatron_tip.parallel.launch import end_worker_with, failures_on_record, has_launcher
from megatron_tip.parallel.stop import StopRequested
from megatron_tip.parallel.together import run_on
from megatron_tip.parallel.watchdog import HangWatchdog
from megatron_tip.planning.description import description_of
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.models import ends_of_the_teacher_alone
from megatron_tip.planning.plan import RunPlan, plan_run
from megatron_tip.prompts.verifier import ACCURACY
from megatron_tip.rollout.progress_clock import Show, show_nothing
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.progress import Heldout, RunProgress
from megatron_tip.training.checkpoints.resume import newest_whole, restore
from megatron_tip.training.checkpoints.same_run import check_same_run
from megatron_tip.training.checkpoints.writer import Checkpointer
from megatron_tip.training.finish import finish_run
from megatron_tip.training.heldout import measure_heldout, verify_heldout
from megatron_tip.training.recorder import RecorderState, RunRecorder
from megatron_tip.training.run import Gauge, RolloutSource, TrainingRun
from megatron_tip.training.setup import build_run, with_prompts
from megatron_tip.training.step import SKIPPED_NO_VALID_TOKEN, SKIPPED_NOT_FINITE, train_step
from megatron_tip.training.throughput import Throughput
from megatron_tip.training.weight_sync import update_engine

logger = logging.getLogger(__name__)

MakeGauge = Callable[[Config, RunPlan], Callable[[TrainingRun], Gauge]]
"""Factory of an extra measurement. The first call checks its inputs from files alone, before the first collective. The
function that it returns builds the gauge while the student still has its initial weights.
"""

LOCK_SECONDS = 180.0
"""NFS gives a dead machine's locks back after 90 s."""

AGREEMENT = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""The held-out reverse KL in nats, by the coarser dtype of both models, below which there is nothing to learn: most
likely the student is its own teacher.
"""


def train(config: Config, *, fresh: bool = False, make_gauge: MakeGauge | None = None) -> None:
    """Runs `config` as one worker of its world. Every rank calls it; rank 0 writes the run's files.

    An unfinished run in the folder continues from its newest complete checkpoint; `fresh` removes it instead.

    Args:
        make_gauge: makes an extra measurement. It is passed in because this package must not import `diagnostics`.

    Raises:
        MegatronTipError: an error that the user can fix; raised before the first collective where possible.
        StopRequested: a signal ended the run, and its state is saved.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    plan = plan_run(config, world_size, reads_prompts=False)
    folder = RunFolder.create(config.run.folder)
    if not fresh:
        check_same_run(config)
    if rank == 0:
        log_beginning(config, plan)
    build_gauge = make_gauge(config, plan) if make_gauge else None
    limit = config.fault.collective_timeout_seconds
    worker = init_distributed(timeout_seconds=limit, device_index=plan.device_index)
    lock = RunLock(folder.path)
    run_on(0, partial(take_folder, folder, lock), device=worker.device)
    recorder = RunRecorder(config, folder, worker, Throughput.of_run(config, plan, worker))
    timer = PhaseTimer(worker.device, on_enter=recorder.display.show_phase, on_exit=recorder.phase_ended)
    run, progress, recorder.state = run_to_continue(
        config, plan, worker, timer, folder, build_gauge, recorder.display.show_progress, fresh=fresh
    )
    seconds = config.fault.step_timeout_seconds
    with (
        run.stop,  # a signal ends the run between steps or while it generates; it does not interrupt the final writes
        left_together(),  # outside the recorder, which closes the trackers
        recorder,
    ):
        with (
            recorder.display,
            HangWatchdog(folder.stacks, rank, timeout_seconds=seconds, on_hang=end_worker_with) as watchdog,
            closing(run),
            failures_on_record(),  # innermost, so that the launcher learns of a failure before the clean-up begins
        ):
            files = CheckpointFiles(folder.checkpoints)
            checkpointer = Checkpointer(run, recorder, files, run.stop, resumed_step=progress.step)
            before, after = run_steps(run, recorder, checkpointer, watchdog, progress)
            end_without_updates(config, progress)
        finish_run(run, plan, folder, recorder, before, after)
    lock.release()
    destroy_distributed()


def log_beginning(config: Config, plan: RunPlan) -> None:
    """Logs what the run will do, and whether its Megatron-Core is one that no test runs with."""
    for line in description_of(config, plan):
        logger.info("%s", line)
    if untested := untested_megatron():
        logger.warning("%s", untested)


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
    show_progress: Show = show_nothing,
    *,
    fresh: bool,
) -> tuple[TrainingRun, RunProgress, RecorderState]:
    """Returns the run, its progress and its totals from the newest complete checkpoint.

    Without a checkpoint, clears the folder and returns a new run. The gauge is built before the weights are restored.
    Collective over the world. Raises what `with_prompts`, `newest_whole`, `build_run` and `restore` raise.

    Args:
        show_progress: shows the progress of a rollout.
        fresh: clears the folder first.
    """
    files = CheckpointFiles(folder.checkpoints)
    plan = with_prompts(config, plan, worker)  # before anything is removed; not kept after the set-up
    if worker.rank == 0 and fresh:
        folder.clear()
    step = newest_whole(files, worker.device)
    if worker.rank == 0 and step is None:
        folder.clear()
    dist.barrier()
    start = time.monotonic()
    num_threads = config.run.threads or available_threads()
    run = build_run(config, plan, worker, timer, num_threads=num_threads, show_progress=show_progress)
    if build_gauge:
        run = replace(run, gauge=build_gauge(run))
    age = time.time() - psutil.Process().create_time()
    logger.info(
        "models and engine are ready after %.1f s, %.1f s after the process started", time.monotonic() - start, age
    )
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
    """Makes all ranks wait for rank 0 to close its trackers when they end the run together.

    srun and our launcher kill the other ranks as soon as one exits with a non-zero code.
    """
    try:
        yield
    except BaseException as reason:
        if is_shared(reason):
            dist.barrier()
        raise


def is_shared(reason: BaseException) -> bool:
    """Returns whether `reason` is raised on all ranks and leaves a state that can be saved."""
    return isinstance(reason, StopRequested | EngineError | TooManySkips)


def run_steps(
    run: TrainingRun, recorder: RunRecorder, checkpointer: Checkpointer, watchdog: HangWatchdog, progress: RunProgress
) -> tuple[Heldout, Heldout]:
    """Takes the remaining steps; returns the held-out measurements before the first step and after the last.

    Updates `progress`. If a signal, a failed engine or too many skips end the run on all ranks, saves the state and
    re-raises.
    """
    try:
        return _run_steps(run, recorder, checkpointer, watchdog, progress)
    except BaseException as reason:
        if not is_shared(reason):
            raise
        checkpointer.save(progress)
        checkpointer.finish()
        if dist.get_rank() == 0 and progress.step and not (has_launcher() and isinstance(reason, StopRequested)):
            logger.warning("ended by %s; saved after step %d; the same command continues it", reason, progress.step)
        raise


def _run_steps(
    run: TrainingRun, recorder: RunRecorder, checkpointer: Checkpointer, watchdog: HangWatchdog, progress: RunProgress
) -> tuple[Heldout, Heldout]:
    """Runs the loop: `train_step`, then sync, record and save.

    A resumed run first syncs the checkpoint's weights and then records its step, unless that was done already.
    """
    if progress.before is None:
        progress.unrecorded = run.on_source(_prompt_metrics)
    after = _sync_and_record(run, recorder, checkpointer, progress, first=True)
    while progress.step < run.config.training.steps:
        end_after_skips(run.config, progress)
        watchdog.step_done()
        checkpointer.between_steps(progress)
        metrics = train_step(run, progress.step + 1)
        is_finite = SKIPPED_NOT_FINITE not in metrics
        progress.take_step(metrics, is_update=is_finite and SKIPPED_NO_VALID_TOKEN not in metrics, is_finite=is_finite)
        after = _sync_and_record(run, recorder, checkpointer, progress)
    watchdog.step_done()
    checkpointer.finish()
    assert progress.before is not None, "measured before the first step"
    return progress.before, after or progress.before


def _sync_and_record(
    run: TrainingRun, recorder: RunRecorder, checkpointer: Checkpointer, progress: RunProgress, *, first: bool = False
) -> Heldout | None:
    """Syncs the last step's weights to the engine, then records that step; returns its held-out measurement."""
    checkpointer.heed_stop()  # before weights go to servers that the same signal may have ended
    synced = update_engine(run, weight_version=progress.step, first=first)
    if progress.unrecorded is None:
        return None
    progress.unrecorded |= synced
    return record_step(run, recorder, progress)


def record_step(run: TrainingRun, recorder: RunRecorder, progress: RunProgress) -> Heldout:
    """Records the last step, with the held-out measurement if it is due; returns the measurement or an empty one."""
    assert progress.unrecorded is not None, "something to record"
    step, heldout = progress.step, Heldout(float("nan"), [])
    metrics = progress.unrecorded
    if _measures_after(run.config, step):
        with run.timer.phase("heldout"):
            reverse_kl, rollouts = measure_heldout(run, step)
            verified = verify_heldout(run, rollouts)
        kept = rollouts[: run.config.heldout.num_samples]
        heldout = Heldout(reverse_kl, kept, verified.get(ACCURACY, float("nan")))
        metrics = metrics | {run.teacher.heldout_metric: reverse_kl} | verified
    if run.gauge is not None:
        with run.timer.phase("diagnose"):
            run.enter("measure")
            metrics = metrics | run.gauge(step)
    recorder.record(step, metrics | run.timer.step_metrics() | run.memory.step_metrics(), run.views.latest)
    progress.unrecorded = None
    if step == 0:
        progress.before = heldout
        if heldout.reverse_kl < AGREEMENT[Dtypes.of(run.config).coarser]:
            logger.warning(
                "student and teacher agree everywhere (held-out reverse KL %.1e): are teacher.path and the teacher's "
                "prompt right?",
                heldout.reverse_kl,
            )
    return heldout


def end_after_skips(config: Config, progress: RunProgress) -> None:
    """Raises if too many steps in a row were skipped because they were not finite.

    Raises:
        TooManySkips: after fault.max_skipped_steps of them, on every rank. A resumed run counts from 0 again.
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
    """Ends a run that took all of its steps, however often it was continued, and updated nothing in any of them.

    Raises:
        TooManySkips: no step updated the student; on every rank.
    """
    if not progress.num_updates:
        raise TooManySkips(
            f"none of the {progress.step} steps updated the student: each lacked a finite loss or gradient, whose "
            f"rollouts are in {RunFolder(config.run.folder).skipped}, readable by the replay engine, or a token to "
            "supervise; start over with --fresh and other settings"
        )


def _measures_after(config: Config, step: int) -> bool:
    every = config.heldout.every_steps
    is_due = step in (0, config.training.steps) or (every > 0 and step % every == 0)
    return is_due and config.heldout.num_prompts > 0


def _prompt_metrics(source: RolloutSource) -> dict[str, float]:
    """Returns how many prompts were left out, as metrics."""
    return {
        "prompts/num_copies": float(source.prompts.num_copies),
        "prompts/num_skipped": float(source.prompts.num_skipped),
        "prompts/num_duplicates": float(source.prompts.num_duplicates),
    }
