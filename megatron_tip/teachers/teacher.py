"""The interface of every teacher: its output for rollouts, the statistics and the loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.errors import NotFiniteError
from megatron_tip.models.student import Student
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import TeacherRows
from megatron_tip.statistics import TokenStatistics
from megatron_tip.vocab_parallel import ShardedVocabulary

T = TypeVar("T")
Rows = TypeVar("Rows", bound=TeacherRows)


class Teacher(ABC, Generic[Rows]):
    """The teacher of a run. `Rows`: its output, which the run only splits, selects and sends.

    `heldout_statistic`: the field of TokenStatistics that the held-out measurement averages.
    """

    heldout_statistic: ClassVar[str]

    def close(self) -> None:
        """Closes what the teacher holds open."""

    def tensors(self) -> dict[str, list[Tensor]]:
        """Returns the tensors that this rank holds for the teacher, as "teacher", which `ask` needs, and "head", which
        scoring and loss need; empty for a teacher elsewhere.
        """
        return {}

    def follow(self, student: Student) -> None:
        """Takes over the student's new weights, as far as the teacher follows them. Called after each update."""

    def sharded_state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns what a checkpoint must hold of the teacher, as Megatron's sharded tensors; collective like theirs.

        Empty for a teacher whose weights the run does not change.
        """
        return {}

    def load_sharded_state(self, loaded: dict[str, Any]) -> None:
        """Takes over the tensors of a `sharded_state` that a checkpoint held."""

    @property
    def sequence_multiple(self) -> int:
        """A divisor of the tokens of every sequence, for the teacher's own layout."""
        return 1

    @property
    def token_multiple(self) -> int:
        """A divisor of the tokens of every micro-batch, for the teacher's own layers."""
        return 1

    @property
    def heldout_metric(self) -> str:
        """The name of the held-out metric."""
        return f"heldout/{self.heldout_statistic}"

    @abstractmethod
    def ask(self, batch: StepBatch) -> Rows | None:
        """Returns the teacher's output for this rank's part of its student replica, in the order of its rows.

        On the student's last stage, equal on all its tp ranks; None elsewhere. Collective over the world.
        """

    @abstractmethod
    def score(
        self,
        student: Student,
        batch: StepBatch,
        rows: Rows | None,
        *,
        with_support: bool = False,
        held: list[Tensor] | None = None,
    ) -> tuple[TokenStatistics | None, Rows | None]:
        """Returns the statistics of every valid token that this rank holds, and its rows, possibly with more fields.

        Both are on the last stage; None elsewhere. Statistics are NaN in micro-batches whose student logits are not
        finite. One forward pass of the student. Collective over the world.

        Args:
            rows: from `ask`.
            with_support: includes the top-K of both models even if the teacher does not need them.
            held: receives the student's outputs with their graphs; None: the pass has no gradient.
        """

    def statistics(
        self,
        student: Student,
        hidden: Tensor,
        rows: Rows,
        labels: Tensor,
        *,
        support_size: int | None = None,
        with_support: bool = False,
    ) -> TokenStatistics:
        """Returns the statistics of n rows, for a K other than the run's if wanted; no gradient.

        Only for teachers that need nothing but their rows; diagnostics reject others. Collective over the tp group of
        the last stage, equal on all its ranks.

        Args:
            hidden: `[n, H]`, the student's. labels: `[n]`.
            support_size: K; None: the configured one.
            with_support: includes the ids of both models' supports and their logprobs.

        Raises:
            NotFiniteError: the logits are not finite; on all tp ranks.
        """
        raise AssertionError(f"{type(self).__name__} scores whole batches; diagnostics reject it")

    @abstractmethod
    def loss(
        self, student: Student, hidden: Tensor, rows: Rows, labels: Tensor, row_weights: Tensor, divergence: str = ""
    ) -> Tensor:
        """Returns the weighted sum of the loss over the supervised rows: float32 scalar, equal on all tp ranks.

        Args:
            hidden: `[k, H]`, the student's, with gradient. labels, row_weights: `[k]`.
            divergence: as in `loss.divergence`; "": the configured one.
        """


@dataclass(frozen=True)
class TeacherSite:
    """The inputs for building a teacher, besides the configuration.

    `checkpoint`: its weights; None for a teacher outside the trainer's processes, and for a live student. `groups`:
    this rank's groups in the teacher's layout. `vocabulary`: the ids shared with the student. `padded_vocab_size`: rows
    of both LM heads. `required_statistics`: those that the run's rule reads.
    """

    checkpoint: HfCheckpoint | None
    student: Student
    groups: ModelGroups
    student_groups: ModelGroups
    vocabulary: ShardedVocabulary
    padded_vocab_size: int
    required_statistics: frozenset[str]
    dtype: torch.dtype
    device: torch.device


def score_micro_batches(
    student: Student,
    batch: StepBatch,
    rows: Rows | None,
    score: Callable[[Tensor, Rows, Tensor], T],
    unknown: Callable[[Rows], T],
    *,
    held: list[Tensor] | None = None,
) -> list[T]:
    """Returns the result of `score` for each of this rank's micro-batches on the last stage; empty elsewhere.

    One forward pass. Only one micro-batch's hidden states and one chunk of logits exist at a time, unless `held` takes
    the hidden states with their graphs.

    Args:
        score: takes the student's hidden states `[n, H]`, the teacher's rows and the labels `[n]`.
        unknown: gives the result for a micro-batch for which `score` raises NotFiniteError.
    """
    rank = student.groups.dp_cp_rank
    micro_batches = batch.micro_batches(rank)
    parts = rows.split(batch.num_rows()[rank]) if rows is not None else ()
    found: list[T] = []

    def keep(index: int, hidden_states: Tensor) -> None:
        mask = micro_batches[index].loss_mask
        try:
            value = score(student.rows(hidden_states, mask), parts[index], micro_batches[index].labels[mask])
        except NotFiniteError:  # the same on all tp ranks; continue, as other replicas and stages wait for this one
            value = unknown(parts[index])
        found.append(value)

    student.forward(micro_batches, keep, held=held)
    return found
