"""Where a step's rollouts come from: the engine in the first process, for all ranks."""

import logging
from collections.abc import Sequence

from megatron_tip.errors import WeightsLostError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.rollout.storage import write_rollouts
from megatron_tip.rollout.transfer import broadcast_rollouts
from megatron_tip.teachers.names import tell_teachers, with_teachers
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.weight_sync import sync_engine

logger = logging.getLogger(__name__)


def generate_rollouts(
    run: TrainingRun, prompts: Sequence[Prompt], sampling: SamplingParams, *, weight_version: int
) -> list[Rollout]:
    """The engine's responses, on every rank; empty responses are left in and have no valid token.

    When the servers lost the weights on the way, all ranks sync those of `weight_version` once more, and generation
    goes on where it was.
    """

    def generate() -> list[Rollout] | None:
        assert run.engine is not None, "the engine lives in the first process"
        try:
            with run.stop.interruptible():
                rollouts = (run.ahead.take if run.ahead else run.engine.generate)(prompts, sampling)
        except WeightsLostError as error:
            logger.warning("step of weights %d: %s; syncing them again", weight_version, error)
            return None
        rollouts = with_teachers(rollouts, prompts) if run.config.prompts.teacher_field else rollouts
        if run.config.output.save_rollouts:
            write_rollouts(RunFolder(run.config.run.folder).rollouts, sampling.batch_name, rollouts, prompts)
        return rollouts

    while (rollouts := broadcast_rollouts(generate, device=run.device)) is None:
        sync_engine(run, weight_version=weight_version)
    return tell_teachers(rollouts, device=run.device) if run.config.prompts.teacher_field else rollouts


def start_next_batch(run: TrainingRun, step: int) -> None:
    """With rollout.ahead = 1, has the batch behind `step` generated beside it. No collective."""
    if run.ahead and run.prompts and step < run.config.training.steps:
        run.ahead.start(run.prompts.batch(step + 1), run.sampling.for_step(step + 1))
