"""Everything that a training run holds between steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.models.student import Student
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.stop import StopSignals
from megatron_tip.parallel.together import run_on
from megatron_tip.prompts.source import PromptSource
from megatron_tip.records import Rollout
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams
from megatron_tip.selection import Calibration, Selector
from megatron_tip.teachers.teacher import Teacher
from megatron_tip.training.token_views import TokenViews
from megatron_tip.vocab_parallel import ShardedVocabulary

T = TypeVar("T")


@dataclass(frozen=True)
class RolloutSource:
    """Where rollouts come from: the prompts of every step, and the engine that answers them."""

    prompts: PromptSource
    engine: RolloutEngine


@dataclass
class LastStep:
    """What a step leaves for the next one, if the run asks for it; equal on every rank."""

    calibration: Calibration | None = None


Gauge = Callable[[int], dict[str, float]]
"""What else is measured after so many steps, 0 too: metrics, equal on every rank. Collective over the world."""


@dataclass(frozen=True)
class TrainingRun:
    """What every rank of a run has.

    `architecture`: the student's, after dropped layers. `vocabulary`: the entries that student and teacher share,
    at the temperature of the loss.
    `source`: in the first process only; None elsewhere. `stop`: what may end the run before its last step. `gauge`:
    the context bank, where the run is measured on one.
    """

    config: Config
    device: torch.device
    student: Student
    teacher: Teacher[Any]
    architecture: ModelArchitecture
    vocabulary: ShardedVocabulary
    selector: Selector
    sampling: SamplingParams
    pad_token_id: int
    source: RolloutSource | None
    timer: PhaseTimer
    views: TokenViews
    last_step: LastStep = field(default_factory=LastStep)
    stop: StopSignals = field(default_factory=StopSignals)
    gauge: Gauge | None = None

    def on_source(self, action: Callable[[RolloutSource], T]) -> T:
        """Returns, on every rank, what `action` does with the source in the first process; its result travels as JSON.

        Collectives and errors as of `run_on`.
        """

        def act() -> T:
            assert self.source is not None, "the source lives in the first process"
            return action(self.source)

        return run_on(0, act, device=self.device)

    def batch_of(self, rollouts: Sequence[Rollout]) -> StepBatch:
        """Returns the rollouts in micro-batches over the student's replicas."""
        return StepBatch.over(
            rollouts,
            dp_size=self.student.groups.grid.dp_size,
            max_tokens=self.config.training.max_tokens_per_micro_batch,
            pad_token_id=self.pad_token_id,
            sequence_multiple=self.student.sequence_multiple,
            device=self.device,
        )

    def close(self) -> None:
        """Ends the run's own servers, in the first process; they also end with it."""
        if self.source is not None:
            self.source.engine.close()
