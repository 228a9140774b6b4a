"""Where a step's rollouts come from: the engine in the first process, for all ranks."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from megatron_tip.errors import WeightsLostError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.rollout.storage import write_rollouts
from megatron_tip.rollout.transfer import broadcast_rollouts
from megatron_tip.training.run import RolloutSource, TrainingRun
from megatron_tip.training.weight_sync import sync_engine

logger = logging.getLogger(__name__)


def training_rollouts(run: TrainingRun, step: int) -> list[Rollout]:
    """Returns the rollouts of training step `step`, on every rank; then the engine may begin those of the next one.

    Errors as of `generate_rollouts`.
    """
    source = run.source
    prompts = source.prompts.batch(step) if source else []
    rollouts = generate_rollouts(run, prompts, run.sampling.for_step(step), weight_version=step - 1)
    if source and step < run.config.training.steps:
        source.engine.start_next(source.prompts.batch(step + 1), run.sampling.for_step(step + 1))
    return rollouts


def heldout_rollouts(run: TrainingRun, step: int) -> list[Rollout]:
    """Returns the student's answers to the held-out prompts after `step` steps, on every rank.

    Errors as of `generate_rollouts`.
    """
    prompts = run.source.prompts.heldout if run.source else []
    return generate_rollouts(run, prompts, run.sampling.for_heldout(step), weight_version=step)


def generate_rollouts(
    run: TrainingRun, prompts: Sequence[Prompt], sampling: SamplingParams, *, weight_version: int
) -> list[Rollout]:
    """Returns the engine's responses, on every rank; empty responses are left in and have no valid token.

    When the servers lost the weights meanwhile, all ranks sync those of `weight_version` once more, and generation
    continues where it was.

    Args:
        prompts: read in the first process only.

    Raises:
        StopRequested: the first process was told to stop while it generated; on every rank.
        EngineError: as of `RolloutEngine.generate`.
    """

    def generate() -> list[Rollout] | None:
        assert run.source is not None, "the engine lives in the first process"
        try:
            with run.stop.interruptible():
                rollouts = run.source.engine.generate(prompts, sampling)
        except WeightsLostError as error:
            logger.warning("step of weights %d: %s; syncing them again", weight_version, error)
            return None
        rollouts = _with_teachers(rollouts, prompts) if run.config.prompts.teacher_field else rollouts
        if run.config.output.save_rollouts:
            write_rollouts(RunFolder(run.config.run.folder).rollouts, sampling.batch_name, rollouts, prompts)
        return rollouts

    while (rollouts := broadcast_rollouts(generate, device=run.device)) is None:
        sync_engine(run, weight_version=weight_version)
    return rollouts


def keep_skipped(run: TrainingRun, step: int, rollouts: Sequence[Rollout], reason: Exception) -> None:
    """Keeps the rollouts of a step that updated nothing in skipped/, for the replay engine, and logs it.

    Collective over the world.

    Raises:
        OutputError: they cannot be written; on every rank.
    """
    folder, name = RunFolder(run.config.run.folder).skipped, run.sampling.for_step(step).batch_name

    def keep(source: RolloutSource) -> None:
        logger.warning("step %d is skipped, its rollouts are in skipped/: %s", step, reason)
        write_rollouts(folder, name, rollouts, source.prompts.batch(step))

    run.on_source(keep)


def _with_teachers(rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> list[Rollout]:
    """Returns `rollouts` with the names of their prompts' teachers."""
    names = {prompt.index: prompt.teacher for prompt in prompts}
    return [replace(rollout, teacher=names.get(rollout.prompt_index) or rollout.teacher) for rollout in rollouts]
