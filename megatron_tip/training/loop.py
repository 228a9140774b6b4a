"""The run from its first file to its last."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_tip.config import Config, FaultConfig
from megatron_tip.conversion.bridge import save_hf
from megatron_tip.conversion.megatron_checkpoint import save_megatron_checkpoint
from megatron_tip.errors import EngineError, PeerError, TooManySkips
from megatron_tip.observability.memory import peak_rss_bytes
from megatron_tip.observability.progress import ProgressDisplay
from megatron_tip.observability.run_folder import RunFolder, Sample
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import Worker, destroy_distributed, init_distributed
from megatron_tip.parallel.environment import available_threads
from megatron_tip.parallel.launch import end_worker_with, failures_on_record
from megatron_tip.parallel.stop import StopRequested
from megatron_tip.parallel.watchdog import HangWatchdog
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.plan import RunPlan, plan_run
from megatron_tip.report.picture import write_report
from megatron_tip.rollout.engine import ServedEngine
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.progress import Heldout, RunProgress
from megatron_tip.training.checkpoints.resume import newest_whole, restore
from megatron_tip.training.checkpoints.same_run import check_same_run
from megatron_tip.training.checkpoints.writer import Checkpointer
from megatron_tip.training.heldout import heldout_metric, measure_heldout
from megatron_tip.training.observers import RunObservers
from megatron_tip.training.recorder import RecorderState, RunRecorder
from megatron_tip.training.run import Gauge, TrainingRun
from megatron_tip.training.setup import build_run
from megatron_tip.training.step import SKIPPED_NOT_FINITE, train_step
from megatron_tip.training.weight_sync import update_engine

logger = logging.getLogger(__name__)

MakeGauge = Callable[[Config, RunPlan], Callable[[TrainingRun], Gauge]]
"""Checks from files alone what else is measured, before the first collective; what it returns builds it, at the
student's start."""

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
    files = CheckpointFiles(folder.checkpoints)
    if not fresh:
        check_same_run(config)
    build_gauge = make_gauge(config, plan) if make_gauge else None
    worker = init_distributed(timeout_seconds=collective_timeout_seconds(config.fault))
    if rank == 0 and fresh:
        folder.clear()
    display = ProgressDisplay(config.training.steps, enabled=rank == 0)
    observers = RunObservers(config, plan, folder, worker)
    timer = PhaseTimer(worker.device, on_enter=display.show_phase, on_exit=observers.on_phase)
    run, progress, recorded = run_to_continue(config, plan, worker, timer, folder, files, build_gauge)
    if rank == 0:
        folder.write_config(config)
    watchdog = HangWatchdog(
        folder.stacks, rank, timeout_seconds=config.fault.step_timeout_seconds, on_hang=end_worker_with
    )
    recorder = RunRecorder(folder, display, observers, writes=rank == 0, resumed=recorded)
    with run.stop, left_together(), observers:  # told to stop over its last files, a run finishes
        with recorder, watchdog, engine_closed(run), failures_on_record():
            checkpointer = Checkpointer(run, recorder, files, run.stop, resumed_step=progress.step)
            before, after = run_steps(run, recorder, checkpointer, watchdog, progress)
        finish_run(run, plan, folder, recorder, observers, before, after)
    destroy_distributed()


def run_to_continue(
    config: Config,
    plan: RunPlan,
    worker: Worker,
    timer: PhaseTimer,
    folder: RunFolder,
    files: CheckpointFiles,
    build_gauge: Callable[[TrainingRun], Gauge] | None,
) -> tuple[TrainingRun, RunProgress, RecorderState | None]:
    """The run with where it stood in its newest whole checkpoint; without one, a new run in a folder that is cleared.

    The gauge is built at the student's start. Collective over the world. Errors as of `newest_whole`, `build_run` and
    `restore`.
    """
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
    if step is None:
        return run, RunProgress(), None
    progress, recorded = restore(run, files, step)
    logger.info("continuing behind step %d", step)
    return run, progress, recorded


@contextmanager
def left_together() -> Iterator[None]:
    """Lets no rank leave a run that all of them end alike before the first process has closed its trackers.

    srun and our launcher end every rank as soon as one has left with an exit code that is not 0.
    """
    try:
        yield
    except BaseException as reason:
        if is_shared(reason):
            dist.barrier()
        raise


def is_shared(reason: BaseException) -> bool:
    """Whether `reason` ends a run on all ranks alike, in a state that can be saved."""
    if isinstance(reason, PeerError):
        return reason.cause == EngineError.__name__
    return isinstance(reason, StopRequested | EngineError | TooManySkips)


@contextmanager
def engine_closed(run: TrainingRun) -> Iterator[None]:
    """Ends the run's own servers behind it, in the first process; they also end with it."""
    try:
        yield
    finally:
        if run.ahead:
            run.ahead.close()
        if isinstance(run.engine, ServedEngine):
            run.engine.close()


def finish_run(
    run: TrainingRun,
    plan: RunPlan,
    folder: RunFolder,
    recorder: RunRecorder,
    observers: RunObservers,
    before: Heldout,
    after: Heldout,
) -> None:
    """Models, samples, report and summary of a run that took its last step. Collective over the world."""
    write_models(run, plan, folder)
    summary = summarise(run, recorder, before, after)
    if dist.get_rank():
        return
    folder.write_samples(samples_of(plan, before, after))
    write_report(folder)
    observers.finish_run()
    folder.write_summary(summary)
    if math.isfinite(before.reverse_kl):
        logger.info("held-out reverse KL %.3f -> %.3f nats a token", before.reverse_kl, after.reverse_kl)
    logger.info("done in %.0f s; see %s", summary["seconds"]["total"], folder.report)


def collective_timeout_seconds(fault: FaultConfig) -> float:
    """After which a collective fails: later than the watchdog, which knows more to say."""
    return fault.step_timeout_seconds + 120.0 if fault.step_timeout_seconds else 7 * 24 * 3600.0


def run_steps(
    run: TrainingRun, recorder: RunRecorder, checkpointer: Checkpointer, watchdog: HangWatchdog, progress: RunProgress
) -> tuple[Heldout, Heldout]:
    """All training steps that are left, with held-out measurements before, in between as configured, and after.

    What ends the run in a state that all ranks share, a signal or a failed engine, is raised again once that state is
    saved. `progress` is kept up to date.
    """
    try:
        return _run_steps(run, recorder, checkpointer, watchdog, progress)
    except BaseException as reason:
        if not is_shared(reason):
            raise
        checkpointer.save(progress)
        checkpointer.finish()
        if dist.get_rank() == 0 and progress.step:
            logger.warning("ended by %s; saved behind step %d: the same command continues", reason, progress.step)
        raise


def _run_steps(
    run: TrainingRun, recorder: RunRecorder, checkpointer: Checkpointer, watchdog: HangWatchdog, progress: RunProgress
) -> tuple[Heldout, Heldout]:
    if progress.before is None:
        progress.unrecorded = _prompt_metrics(run)
    after, first = progress.before, True
    while True:
        checkpointer.heed_stop()  # before weights go to servers that the same signal may have ended
        synced = update_engine(run, weight_version=progress.step, first=first)
        first = False
        if progress.unrecorded is not None:
            progress.unrecorded |= synced
            after = record_step(run, recorder, progress)
        end_after_skips(run, progress)
        watchdog.step_done()
        if progress.step == run.config.training.steps:
            checkpointer.finish()
            assert progress.before is not None, "measured before the first step"
            assert after is not None, "measured after the last step"
            return progress.before, after
        checkpointer.between_steps(progress)
        progress.unrecorded = train_step(run, progress.step + 1)
        progress.step += 1
        skipped = SKIPPED_NOT_FINITE in progress.unrecorded
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0


def record_step(run: TrainingRun, recorder: RunRecorder, progress: RunProgress) -> Heldout:
    """Writes down the last step, with the held-out measurement if it is due; returns that, or an empty one."""
    assert progress.unrecorded is not None, "something to record"
    step, heldout = progress.step, Heldout(float("nan"), [])
    metrics = progress.unrecorded
    if _measures_after(run.config, step):
        with run.timer.phase("heldout"):
            reverse_kl, rollouts = measure_heldout(run, step)
        heldout = Heldout(reverse_kl, rollouts[: run.config.heldout.num_samples])
        metrics = metrics | {heldout_metric(run): reverse_kl}
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


def end_after_skips(run: TrainingRun, progress: RunProgress) -> None:
    """Ends a run of which too many steps in a row were not finite.

    Raises:
        TooManySkips: fault.max_skipped_steps of them; on every rank. The count begins anew when the run is continued.
    """
    most = run.config.fault.max_skipped_steps
    if progress.skipped_in_a_row >= most and progress.step < run.config.training.steps:
        progress.skipped_in_a_row = 0
        raise TooManySkips(
            f"step {progress.step}: the loss or the gradient was not finite {most} steps in a row "
            f"(fault.max_skipped_steps); their rollouts are in {RunFolder(run.config.run.folder).skipped}, readable by "
            "the replay engine"
        )


def _measures_after(config: Config, step: int) -> bool:
    every = config.heldout.every_steps
    is_due = step in (0, config.training.steps) or (every > 0 and step % every == 0)
    return is_due and config.heldout.num_prompts > 0


def _prompt_metrics(run: TrainingRun) -> dict[str, float]:
    """What was left out of the prompts, in the first process."""
    if run.prompts is None:
        return {}
    return {
        "prompts/num_skipped": float(run.prompts.num_skipped),
        "prompts/num_duplicates": float(run.prompts.num_duplicates),
    }


def write_models(run: TrainingRun, plan: RunPlan, folder: RunFolder) -> None:
    """The student as Megatron's shards and as a Hugging Face directory. Collective over the world."""
    with run.timer.phase("save"):
        model, groups = run.student.model, run.student.groups
        if run.config.output.save_checkpoint:
            save_megatron_checkpoint(model, plan.student, groups, folder.checkpoint, overwrite=True)
        if run.config.output.export_hf:
            save_hf(model, plan.student, groups, folder.hf, overwrite=True)


def summarise(run: TrainingRun, recorder: RunRecorder, before: Heldout, after: Heldout) -> dict[str, Any]:
    """The content of summary.json, equal on every rank. Collective over the world."""
    peak_rss = torch.tensor(peak_rss_bytes(), device=run.device)
    dist.all_reduce(peak_rss)
    grid = run.student.groups.grid
    totals = recorder.state
    got = totals.num_selected / totals.num_valid if totals.num_valid else None
    return {
        "steps": run.config.training.steps,
        "world": {"tp": grid.tp_size, "pp": grid.pp_size, "dp": grid.dp_size},
        "heldout_reverse_kl": {"before": before.reverse_kl, "after": after.reverse_kl},
        "retention_ratio": {"asked": run.config.selection.retention_ratio, "got": got},
        "tokens": {
            "valid": totals.num_valid,
            "selected": totals.num_selected,
            "trained": totals.num_model_tokens,
            "trained_uncut": totals.num_model_tokens_uncut,
        },
        "saved_train_seconds": totals.saved_seconds,
        "seconds": dict.fromkeys(("rollout", "teacher", "score", "train", "sync"), 0.0) | run.timer.total_seconds(),
        "peak_rss_bytes": int(peak_rss),
    }


def samples_of(plan: RunPlan, before: Heldout, after: Heldout) -> list[Sample]:
    """The first held-out prompts with the student's responses before and after."""
    old_rollouts = {rollout.prompt_index: rollout for rollout in before.rollouts}  # some may have been set aside
    texts = [
        [_decoded(plan, ids) for ids in (old.prompt_ids, old.response_ids, new.response_ids)]
        for new in after.rollouts
        if (old := old_rollouts.get(new.prompt_index))
    ]
    return [Sample(*text) for text in texts]


def _decoded(plan: RunPlan, ids: tuple[int, ...]) -> str:
    text = plan.tokenizer.decode(list(ids))
    assert isinstance(text, str), "one sequence gives one text"
    return text
