"""The objects that a training run keeps between steps."""

import math
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
from megatron_tip.planning.passes import OnePass
from megatron_tip.prompts.source import PromptSource
from megatron_tip.prompts.verifier import Verifier
from megatron_tip.records import Rollout
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams
from megatron_tip.rollout.handover.exchange import HandleExchange
from megatron_tip.selection import AdaptiveRatio, Selector
from megatron_tip.teachers.teacher import Teacher
from megatron_tip.training.device_memory import DeviceMemory
from megatron_tip.training.token_views import TokenViews
from megatron_tip.vocab_parallel import ShardedVocabulary

T = TypeVar("T")


@dataclass(frozen=True)
class RolloutSource:
    """The source of rollouts: the prompts of every step, and the engine that answers them.

    `verifier`: of the answers to held-out prompts; None: they are not verified.
    """

    prompts: PromptSource
    engine: RolloutEngine
    verifier: Verifier | None = None


@dataclass
class LastStep:
    """State that a step leaves for the next one, if the run uses it; equal on every rank."""

    adaptive_ratio: AdaptiveRatio | None = None


Gauge = Callable[[int], dict[str, float]]
"""An extra measurement after a given number of steps, 0 included. Returns metrics, equal on every rank. Collective."""


@dataclass(frozen=True)
class TrainingRun:
    """The state of a run on one rank.

    `architecture`: the student's, without dropped layers. `vocabulary`: the ids that student and teacher share, at the
    loss temperature. `one_pass`: the batches whose scoring forward pass is also that of the training. `source`: None
    except on rank 0. `stop`: signals that may end the run early. `gauge`: measures on the context bank, if the run has
    one. `exchange`: this rank's part in weight syncs by IPC, if ranks other than the first take part.
    """

    config: Config
    device: torch.device
    student: Student
    teacher: Teacher[Any]
    architecture: ModelArchitecture
    vocabulary: ShardedVocabulary
    selector: Selector
    one_pass: OnePass
    sampling: SamplingParams
    pad_token_id: int
    source: RolloutSource | None
    timer: PhaseTimer
    views: TokenViews
    memory: DeviceMemory
    last_step: LastStep = field(default_factory=LastStep)
    stop: StopSignals = field(default_factory=StopSignals)
    gauge: Gauge | None = None
    exchange: HandleExchange | None = None

    def enter(self, phase: str) -> None:
        """Makes room for `phase`, one of `planning.phases.PHASES`: trainer and servers move what that needs.

        Does nothing if the phase is the present one or nothing moves in this run. Collectives and errors are those of
        `DeviceMemory.enter`.
        """
        self.memory.enter(phase, self.source.engine if self.source is not None else None)

    def on_source(self, action: Callable[[RolloutSource], T]) -> T:
        """Runs `action` on rank 0 and returns its result on every rank. The result is sent as JSON.

        Collectives and errors are those of `run_on`.
        """

        def act() -> T:
            assert self.source is not None, "the source lives in the first process"
            return action(self.source)

        return run_on(0, act, device=self.device)

    def batch_of(self, rollouts: Sequence[Rollout]) -> StepBatch:
        """Returns the rollouts as micro-batches, distributed over the student's replicas."""
        return StepBatch.over(
            rollouts,
            dp_size=self.student.groups.grid.dp_size,
            max_tokens=self.config.training.max_tokens_per_micro_batch,
            pad_token_id=self.pad_token_id,
            token_multiple=math.lcm(self.student.token_multiple, self.teacher.token_multiple),
            device=self.device,
            sequence_multiple=math.lcm(self.student.groups.grid.sequence_multiple, self.teacher.sequence_multiple),
            cp_size=self.student.groups.grid.cp_size,
        )

    def close(self) -> None:
        """Stops the run's own servers, in the first process, and closes the teacher's connections."""
        self.teacher.close()
        if self.source is not None:
            self.source.engine.close()
