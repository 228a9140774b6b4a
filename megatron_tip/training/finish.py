"""The outputs of a finished run: models, samples, report and summary."""

import logging
import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_tip.conversion.bridge import save_hf
from megatron_tip.conversion.megatron_checkpoint import save_megatron_checkpoint
from megatron_tip.errors import OutputError
from megatron_tip.observability.memory import peak_rss_bytes
from megatron_tip.observability.run_folder import RunFolder, Sample
from megatron_tip.planning.plan import RunPlan
from megatron_tip.report.picture import write_report
from megatron_tip.training.checkpoints.progress import Heldout
from megatron_tip.training.recorder import RecorderState, RunRecorder
from megatron_tip.training.run import TrainingRun

logger = logging.getLogger(__name__)


def finish_run(
    run: TrainingRun, plan: RunPlan, folder: RunFolder, recorder: RunRecorder, before: Heldout, after: Heldout
) -> None:
    """Writes the models, samples, report and summary after the last step. Collective over the world."""
    write_models(run, plan, folder)
    summary = summarise(run, recorder.state, before, after)
    if dist.get_rank():
        return
    folder.write_samples(samples_of(plan, before, after))
    write_report(folder)
    recorder.finish_run()
    folder.write_summary(summary)
    if math.isfinite(before.reverse_kl):
        logger.info("held-out reverse KL %.3f -> %.3f nats per token", before.reverse_kl, after.reverse_kl)
    if math.isfinite(before.accuracy):
        logger.info("right answers to held-out questions %.0f%% -> %.0f%%", 100 * before.accuracy, 100 * after.accuracy)
    logger.info("done in %.0f s; see %s", summary["seconds"]["total"], folder.report)


def write_models(run: TrainingRun, plan: RunPlan, folder: RunFolder) -> None:
    """Writes the student as a Megatron checkpoint and as a Hugging Face folder, as configured.

    Collective over the world.

    Raises:
        OutputError: one of them cannot be written, on every rank. If only the export failed, the log has the command
            that makes it from the checkpoint.
    """
    with run.timer.phase("save"):
        model, groups = run.student.model, run.student.groups
        if run.config.output.save_checkpoint:
            save_megatron_checkpoint(model, plan.student, groups, folder.checkpoint, overwrite=True)
        if run.config.output.export_hf:
            try:
                save_hf(model, plan.student, groups, folder.hf, overwrite=True)
            except OutputError:
                if run.config.output.save_checkpoint and dist.get_rank() == 0:
                    logger.error(
                        "the trained student is in %s; to export it: python tools/convert_megatron_to_hf.py %s %s",
                        *(folder.checkpoint, folder.checkpoint, folder.hf),
                    )
                raise


def summarise(run: TrainingRun, totals: RecorderState, before: Heldout, after: Heldout) -> dict[str, Any]:
    """Returns the content of summary.json, equal on every rank. Collective over the world."""
    peak_rss = torch.tensor(peak_rss_bytes(), device=run.device)
    dist.all_reduce(peak_rss)
    grid = run.student.groups.grid
    got = totals.num_selected / totals.num_valid if totals.num_valid else None
    verified = {"heldout_task_accuracy": {"before": before.accuracy, "after": after.accuracy}}
    return {
        "steps": run.config.training.steps,
        "world": grid.sizes(),
        "heldout_reverse_kl": {"before": before.reverse_kl, "after": after.reverse_kl},
        **(verified if math.isfinite(before.accuracy) else {}),
        "retention_ratio": {"asked": run.selector.asked_share, "got": got},
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
    """Returns the first held-out prompts with the student's responses before and after."""
    old_rollouts = {rollout.prompt_index: rollout for rollout in before.rollouts}  # some may have been set aside
    texts = [
        [str(plan.tokenizer.decode(list(ids))) for ids in (old.prompt_ids, old.response_ids, new.response_ids)]
        for new in after.rollouts
        if (old := old_rollouts.get(new.prompt_index))
    ]
    return [Sample(*text) for text in texts]
