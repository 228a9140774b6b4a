"""Everything that a training run holds between steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.models.student import Student
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.stop import StopSignals
from megatron_tip.prompts.source import PromptSource
from megatron_tip.records import Rollout
from megatron_tip.rollout.ahead import AheadGenerator
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams
from megatron_tip.selection import Calibration, Selector
from megatron_tip.teachers.teacher import Teacher
from megatron_tip.training.token_views import TokenViews


@dataclass
class LastStep:
    """What a step leaves for the next one, if the run asks for it; equal on every rank."""

    calibration: Calibration | None = None


Gauge = Callable[[int], dict[str, float]]
"""What else is measured after so many steps, 0 too: metrics, equal on every rank. Collective over the world."""


@dataclass(frozen=True)
class TrainingRun:
    """What every rank of a run has.

    `architecture`: the student's, after dropped layers. `vocab_size`: the entries that student and teacher share.
    `prompts`, `engine`: in the first process only; None elsewhere. `ahead`: there as well, with rollout.ahead = 1.
    `stop`: what may end the run before its last step. `gauge`: the context bank, where the run is measured on one.
    """

    config: Config
    device: torch.device
    student: Student
    teacher: Teacher[Any]
    architecture: ModelArchitecture
    vocab_size: int
    selector: Selector
    sampling: SamplingParams
    pad_token_id: int
    prompts: PromptSource | None
    engine: RolloutEngine | None
    timer: PhaseTimer
    views: TokenViews
    last_step: LastStep = field(default_factory=LastStep)
    ahead: AheadGenerator | None = None
    stop: StopSignals = field(default_factory=StopSignals)
    gauge: Gauge | None = None

    def batch_of(self, rollouts: Sequence[Rollout]) -> StepBatch:
        """The rollouts in micro-batches over the student's replicas."""
        grid = self.student.groups.grid
        return StepBatch.over(
            rollouts,
            dp_size=grid.dp_size,
            max_tokens=self.config.training.max_tokens_per_micro_batch,
            pad_token_id=self.pad_token_id,
            sequence_multiple=grid.tp_size if self.config.model.sequence_parallel else 1,
            device=self.device,
        )
