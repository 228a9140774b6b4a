"""The run from its first file to its last."""

import logging
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.conversion.bridge import save_hf
from megatron_tip.conversion.megatron_checkpoint import save_megatron_checkpoint
from megatron_tip.observability.memory import peak_rss_bytes
from megatron_tip.observability.progress import ProgressDisplay
from megatron_tip.observability.report import write_report
from megatron_tip.observability.run_folder import RunFolder, Sample
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import destroy_distributed, init_distributed
from megatron_tip.parallel.environment import available_threads
from megatron_tip.records import Rollout
from megatron_tip.training.heldout import measure_heldout
from megatron_tip.training.observers import RunObservers
from megatron_tip.training.plan import RunPlan, plan_run
from megatron_tip.training.recorder import RunRecorder
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.setup import build_run
from megatron_tip.training.step import train_step
from megatron_tip.training.weight_sync import sync_weights

logger = logging.getLogger(__name__)

AGREEMENT = 1e-6
"""Reverse KL in nats below which a student has nothing to learn: most likely it was given as its own teacher."""


@dataclass(frozen=True)
class Heldout:
    """A held-out measurement: mean reverse KL in nats a token, and the responses that it was taken on."""

    reverse_kl: float
    rollouts: list[Rollout]


def train(config: Config) -> None:
    """Runs `config` as one worker of its world. Every rank calls it; rank 0 writes the run's files.

    Raises:
        MegatronTipError: what a user can mend; before the first collective where it can be known by then.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    plan = plan_run(config, world_size)
    folder = RunFolder.create(config.run.folder)
    worker = init_distributed()
    display = ProgressDisplay(config.training.steps, enabled=rank == 0)
    observers = RunObservers(config, plan, folder, worker)
    timer = PhaseTimer(worker.device, on_enter=display.show_phase, on_exit=observers.on_phase)
    run = build_run(config, plan, worker, timer, num_threads=config.run.threads or available_threads())
    if rank == 0:
        shutil.rmtree(folder.rollouts, ignore_errors=True)  # of a run in this folder that did not finish
        folder.write_config(config)
    with observers:
        with RunRecorder(folder, display, observers, writes=rank == 0) as recorder:
            before, after = run_steps(run, recorder)
        write_models(run, plan, folder)
        summary = summarise(run, recorder, before, after)
        if rank == 0:
            folder.write_samples(samples_of(run, plan, before, after))
            write_report(folder)
            observers.finish_run()
            folder.write_summary(summary)
            if before.rollouts:
                logger.info("held-out reverse KL %.3f -> %.3f nats a token", before.reverse_kl, after.reverse_kl)
            logger.info("done in %.0f s; see %s", summary["seconds"]["total"], folder.report)
    destroy_distributed()


def run_steps(run: TrainingRun, recorder: RunRecorder) -> tuple[Heldout, Heldout]:
    """All training steps, with held-out measurements before, in between as configured, and after."""
    num_steps, every = run.config.training.steps, run.config.heldout.every_steps
    with run.timer.phase("sync"):
        sync_weights(run.student, run.architecture, run.engine, weight_version=0)
    before = after = _measure(run, recorder, step=0, metrics=_prompt_metrics(run))
    if before.reverse_kl < AGREEMENT:
        logger.warning(
            "student and teacher agree everywhere (held-out reverse KL %.1e): is teacher.path right?", before.reverse_kl
        )
    for step in range(1, num_steps + 1):
        metrics = train_step(run, step)
        if step == num_steps or (every and step % every == 0):
            after = _measure(run, recorder, step, metrics)
        else:
            recorder.record(step, metrics | run.timer.step_metrics(), run.views.latest)
    return before, after


def _prompt_metrics(run: TrainingRun) -> dict[str, float]:
    """What was left out of the prompts, in the first process."""
    if run.prompts is None:
        return {}
    return {
        "prompts/num_skipped": float(run.prompts.num_skipped),
        "prompts/num_duplicates": float(run.prompts.num_duplicates),
    }


def _measure(run: TrainingRun, recorder: RunRecorder, step: int, metrics: dict[str, float]) -> Heldout:
    if not run.config.heldout.num_prompts:
        recorder.record(step, metrics | run.timer.step_metrics(), run.views.latest)
        return Heldout(float("nan"), [])
    with run.timer.phase("heldout"):
        heldout = Heldout(*measure_heldout(run, step))
    metrics = metrics | {"heldout/reverse_kl": heldout.reverse_kl} | run.timer.step_metrics()
    recorder.record(step, metrics, run.views.latest)
    return heldout


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
    got = recorder.num_selected / recorder.num_valid if recorder.num_valid else None
    return {
        "steps": run.config.training.steps,
        "world": {"tp": grid.tp_size, "pp": grid.pp_size, "dp": grid.dp_size},
        "heldout_reverse_kl": {"before": before.reverse_kl, "after": after.reverse_kl},
        "retention_ratio": {"asked": run.config.selection.retention_ratio, "got": got},
        "tokens": {"valid": recorder.num_valid, "selected": recorder.num_selected},
        "seconds": dict.fromkeys(("rollout", "teacher", "score", "train", "sync"), 0.0) | run.timer.total_seconds(),
        "peak_rss_bytes": int(peak_rss),
    }


def samples_of(run: TrainingRun, plan: RunPlan, before: Heldout, after: Heldout) -> list[Sample]:
    """The first held-out prompts with the student's responses before and after."""
    pairs = list(zip(before.rollouts, after.rollouts, strict=True))[: run.config.heldout.num_samples]
    texts = [
        [_decoded(plan, ids) for ids in (old.prompt_ids, old.response_ids, new.response_ids)] for old, new in pairs
    ]
    return [Sample(*text) for text in texts]


def _decoded(plan: RunPlan, ids: tuple[int, ...]) -> str:
    text = plan.tokenizer.decode(list(ids))
    assert isinstance(text, str), "one sequence gives one text"
    return text
