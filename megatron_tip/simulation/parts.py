"""The parts of a simulated run: the product's own student, teacher and selector, with assumed values where they read.

Each subclass calls the product's method; it adds what other ranks would send, and the purpose of what is created.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.conversion.weight_map import hf_shapes
from megatron_tip.models.hidden_states import Piece
from megatron_tip.models.pipeline import LastStage, token_multiple
from megatron_tip.models.student import Student
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import MicroBatch, Prompt, Rollout, TokenIndex, TokenSelection
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams
from megatron_tip.selection import Selector
from megatron_tip.simulation.assumptions import AssumedSelection, OwnReplica
from megatron_tip.simulation.ledger import EXCHANGE, Ledger
from megatron_tip.simulation.world import Answers
from megatron_tip.statistics import TokenStatistics
from megatron_tip.teachers.megatron import HiddenRows, MegatronTeacher
from megatron_tip.training.run import RolloutSource, TrainingRun

ACTIVATIONS = "student: activations"
ROWS_SENT, ROWS_RECEIVED, ROWS_SELECTED = "teacher: rows to send", "teacher: rows of a step", "teacher: rows selected"
OF_ROWS = (ROWS_SENT, ROWS_RECEIVED, ROWS_SELECTED)
"""The purposes whose bytes grow with the rows of a step; others belong to a few micro-batches, or are small."""


class ShapesOnly(HfCheckpoint):
    """A checkpoint without files: every tensor has its shape."""

    def __init__(self, architecture: ModelArchitecture, dtype: torch.dtype) -> None:
        """Stands for the weights of `architecture`."""
        self._shapes = hf_shapes(architecture)
        self._own_architecture, self._dtype = architecture, dtype

    @property
    def architecture(self) -> ModelArchitecture:
        return self._own_architecture

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def read(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], dtype=self._dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return torch.empty((stop - start, *self._shapes[name][1:]), dtype=self._dtype)

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        return torch.empty((self._shapes[name][0], stop - start), dtype=self._dtype)


@dataclass(frozen=True)
class Pipe:
    """What a model's passes receive on this rank from others. `hidden_size`: of the model."""

    model: torch.nn.Module
    groups: ModelGroups
    hidden_size: int
    answers: Answers

    def expect(self, lengths: Sequence[int], num_run: int, *, backward: bool) -> None:
        """Tells what one pass receives: the shapes that every stage learns from its neighbours, and, if replicas share
        experts, how many micro-batches all of them run.

        `lengths`: of this replica's micro-batches. `num_run`: how many it runs, with those of padding alone.
        """
        grid, lengths = self.groups.grid, list(lengths)
        if grid.replicas_share_experts:
            self.answers.counts.append(torch.tensor([num_run]))
            lengths += [math.lcm(token_multiple(self.model), grid.sequence_multiple)] * (num_run - len(lengths))
        shapes = [(length // self._parts, 1, self.hidden_size) for length in lengths]
        if not self.groups.is_first_stage:
            self.answers.forward_shapes.extend(shapes)
        if backward and not self.groups.is_last_stage:
            self.answers.backward_shapes.extend(shapes)

    @property
    def _parts(self) -> int:
        """Into how many parts the ranks of a stage cut a sequence."""
        grid, sequence_parallel = self.groups.grid, get_model_config(self.model).sequence_parallel
        return grid.cp_size * (grid.tp_size if sequence_parallel else 1)


@dataclass(frozen=True)
class SimulatedStudent(Student):
    """The student of a simulated run."""

    ledger: Ledger
    pipe: Pipe
    assumed: AssumedSelection

    def forward(
        self, micro_batches: Sequence[MicroBatch], on_hidden_states: LastStage, *, held: list[Tensor] | None = None
    ) -> None:
        self.pipe.expect(_lengths(micro_batches), self.num_run(self.assumed.scored), backward=False)
        with self.ledger.purpose(ACTIVATIONS):
            super().forward(micro_batches, on_hidden_states, held=held)

    def accumulate_gradients(
        self, micro_batches: Sequence[MicroBatch], loss_of: LastStage, *, held: list[Tensor] | None = None
    ) -> None:
        self.pipe.expect(_lengths(micro_batches), self.num_run(self.assumed.trained), backward=True)
        with self.ledger.purpose(ACTIVATIONS):
            super().accumulate_gradients(micro_batches, loss_of, held=held)

    def num_run(self, batch: StepBatch) -> int:
        """Returns the number of micro-batches that this rank's replica runs in a pass over `batch`."""
        own, groups = len(batch.plan[self.groups.dp_rank]), self.groups
        return max(map(len, batch.plan)) if groups.grid.replicas_share_experts else own

    def apply_gradients(self, step: int) -> dict[str, float]:
        self.ledger.enter("update")
        with self.ledger.purpose("student: optimizer"):
            metrics = super().apply_gradients(step)
        self.ledger.leave()
        return metrics


@dataclass(frozen=True)
class CountedRows(HiddenRows):
    """The teacher's rows of a simulated step; copies of some of them, which are selected, are charged as such."""

    ledger: Ledger

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        with self.ledger.purpose(ROWS_SELECTED):
            return replace(self, states=function(self.states))


@dataclass(frozen=True)
class SimulatedTeacher(MegatronTeacher):
    """A teacher of a simulated run, in the trainer's own processes.

    `own`: the product's. `remaining`: statistics of the pass that scores.
    """

    ledger: Ledger
    pipe: Pipe
    assumed: AssumedSelection
    own: MegatronTeacher
    remaining: list[TokenStatistics]

    def tensors(self) -> dict[str, list[Tensor]]:
        return self.own.tensors()

    def follow(self, student: Student) -> None:
        self.ledger.enter("update")
        self.own.follow(student)
        self.ledger.leave()

    def ask(self, batch: StepBatch) -> HiddenRows | None:
        parts = [part for place in self.served(batch) for part in batch.as_the_teacher_reads_it(*place)]
        self.pipe.expect(_lengths(parts), self.num_run(batch), backward=False)
        with self.ledger.purpose("teacher: activations"):
            rows = super().ask(batch)
            self.ledger.end_moment()
        if rows is None:
            return None
        self.ledger.assign(ROWS_RECEIVED, [rows.states])
        rank = self.student_groups.dp_cp_rank
        with self.ledger.paused():
            self.remaining[:] = self.assumed.statistics_of(rank, batch.num_rows()[rank])
        return CountedRows(rows.states, self.ledger)

    def num_run(self, batch: StepBatch) -> int:
        """Returns the number of micro-batches that this rank's teacher replica runs: of all replicas the most if they
        share experts."""
        counts: Counter[int] = Counter()
        copy, own, is_one = replace(batch), self.groups.dp_rank, not self.groups.grid.replicas_share_experts
        with self.ledger.paused():
            for place, replica in self.serving(batch).items():
                if is_one and replica != own:
                    continue
                counts[replica] += len(copy.as_the_teacher_reads_it(*place)) if batch.teacher_reads_another else 1
        return counts[own] if is_one else max(counts.values())

    def _forward(self, batch: StepBatch) -> dict[Piece, Tensor]:
        outgoing = super()._forward(batch)
        self.ledger.assign(ROWS_SENT, list(outgoing.values()))
        self.ledger.begin_moment(EXCHANGE, ROWS_RECEIVED)
        return outgoing

    def statistics(
        self,
        student: Student,
        hidden: Tensor,
        rows: HiddenRows,
        labels: Tensor,
        *,
        support_size: int | None = None,
        with_support: bool = False,
    ) -> TokenStatistics:
        with self.ledger.purpose("statistics"):
            super().statistics(student, hidden, rows, labels, support_size=support_size, with_support=with_support)
            return TokenStatistics.concatenate([self.remaining.pop(0)])

    def loss(
        self,
        student: Student,
        hidden: Tensor,
        rows: HiddenRows,
        labels: Tensor,
        row_weights: Tensor,
        divergence: str = "",
    ) -> Tensor:
        with self.ledger.purpose("loss"):
            return super().loss(student, hidden, rows, labels, row_weights, divergence)


def _lengths(micro_batches: Iterable[MicroBatch]) -> list[int]:
    return [sum(one.lengths) for one in micro_batches]


class Receiver(RolloutEngine):
    """An engine that takes weights as fast as they come, and does nothing with them."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        raise AssertionError("a simulated step is given its rollouts")

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        for _ in weights:
            pass


def with_receiver(run: TrainingRun, rank: int) -> TrainingRun:
    """Returns the run with an engine in the first process that only receives weights."""
    nothing: Any = None  # no prompts
    return replace(run, source=RolloutSource(nothing, Receiver())) if rank == 0 else run


@dataclass(frozen=True, kw_only=True)
class SimulatedSelector(Selector):
    """The selector of a simulated run: it selects among its replica's rows, and returns the assumed ones."""

    ledger: Ledger
    assumed: AssumedSelection
    replica: int

    def select(
        self,
        statistics: TokenStatistics | None,
        index: TokenIndex,
        *,
        step: int,
        dp_group: dist.ProcessGroup | None = None,
    ) -> TokenSelection:
        assert dp_group is not None, "the training step passes its group"
        with self.ledger.purpose("selection"):
            own = self.select_among(OwnReplica(dp_group), statistics, index, step)
            assumed = self.assumed.selection_of(self.replica)
            return replace(assumed, metrics=own.metrics | assumed.metrics)


def settings_of(instance: Any, names: Collection[str]) -> dict[str, Any]:
    """Returns the fields of a dataclass instance, for its subclass."""
    return {name: getattr(instance, name) for name in names}
