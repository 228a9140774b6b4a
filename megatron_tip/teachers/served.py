"""A teacher behind servers as the ranks of a run see it: who asks, who is told, and what is made of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.errors import EngineError, PeerError
from megatron_tip.models.student import Student
from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import Prompt, Rollout, TeacherTopK, TokenStatistics, TopKTokenStatistics
from megatron_tip.teachers.server_scorer import ServerTeacher
from megatron_tip.vocab_parallel import HiddenAndHead, ShardedVocabulary
from megatron_tip.vocab_parallel.topk_divergence import topk_divergence_loss
from megatron_tip.vocab_parallel.topk_statistics import (
    StudentStatistics,
    combined_statistics,
    known_ids,
    student_statistics,
)

T = TypeVar("T")

_ENGINE_FAILED, _FAILED = 1, 2
"""What a rank that asks tells the others: its servers failed; something else did, which is worse."""


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher, or several, behind SGLang servers.

    One rank of each of the student's replicas asks about that replica's rollouts: the first of its last stage's tp
    group, which tells the others. `scorer`: on those ranks; None elsewhere. `support_size`: K.
    """

    scorer: ServerTeacher | None
    groups: ModelGroups
    device: torch.device
    support_size: int
    asks_student_support: bool

    def topk_rows(self, batch: StepBatch) -> TeacherTopK | None:
        """What the teachers say of this rank's replica, in the order of its rows; None off the last stage.

        Collective over the world.

        Raises:
            EngineError: no server answered; PeerError on the other ranks.
        """
        rollouts = _in_row_order(batch, self.groups.dp_rank)
        answer: TeacherTopK | None = self._asked(
            lambda scorer: scorer.top_k(rollouts, [rollout.teacher for rollout in rollouts])
        )
        if not self.groups.is_last_stage:
            return None
        n, k = sum(batch.num_rows()[self.groups.dp_rank]), self.support_size
        return TeacherTopK(
            label_logprobs=self._told(answer.label_logprobs if answer is not None else None, (n,), torch.float32),
            support_ids=self._told(answer.support_ids if answer is not None else None, (n, k), torch.int64),
            support_logprobs=self._told(answer.support_logprobs if answer is not None else None, (n, k), torch.float32),
        )

    def about_student_support(
        self, batch: StepBatch, rows: TeacherTopK | None, ids: Tensor | None
    ) -> TeacherTopK | None:
        """`rows` with the teachers' logprobs of the student's top-K `ids` `[n, K]`. Collective over the world."""
        rollouts = _in_row_order(batch, self.groups.dp_rank)

        def ask(scorer: ServerTeacher) -> Tensor:
            assert ids is not None, "scored on the last stage"
            return scorer.student_support(rollouts, [rollout.teacher for rollout in rollouts], ids)

        answer = self._asked(ask)
        if rows is None or ids is None:
            return None
        logprobs = self._told(answer, tuple(ids.shape), torch.float32)
        return replace(rows, student_support_ids=ids, student_support_logprobs=logprobs)

    def _asked(self, ask: Callable[[ServerTeacher], T]) -> T | None:
        """What `ask` returns on the ranks that ask; all ranks learn whether one of them failed. One all-reduce.

        Raises:
            EngineError: `ask` did. PeerError: it failed on another rank, `cause` "EngineError" where all that failed
                did so for that; all ranks may then save the run together.
        """
        answer, failure = None, None
        if self.scorer is not None:
            try:
                answer = ask(self.scorer)
            except Exception as error:  # told to the others before it is raised
                failure = error
        kind = 0 if failure is None else _ENGINE_FAILED if isinstance(failure, EngineError) else _FAILED
        worst = torch.tensor(kind, dtype=torch.int32, device=self.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if not worst:
            return answer
        if kind == worst and failure is not None:
            raise failure
        raise PeerError(
            "teacher: a rank that asks the servers failed; its own message says why",
            cause=EngineError.__name__ if worst == _ENGINE_FAILED else "",
        )

    def _told(self, values: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`values` of the asking rank on all ranks of its tp group. One broadcast."""
        told = torch.empty(shape, dtype=dtype, device=self.device)
        if values is not None:
            assert values.shape == shape, f"{list(values.shape)} for rows {list(shape)}"
            told.copy_(values)
        source = dist.get_global_rank(self.groups.tp_group, 0)
        dist.broadcast(told, src=source, group=self.groups.tp_group)
        return told


def _in_row_order(batch: StepBatch, replica: int) -> list[Rollout]:
    """The replica's rollouts, the generated tokens of which are its rows one behind the other."""
    return [batch.rollouts[place] for micro_batch in batch.plan[replica] for place in micro_batch]


def served_statistics(
    student: Student,
    teacher: ServedTeacher,
    batch: StepBatch,
    teacher_rows: TeacherTopK | None,
    vocabulary: ShardedVocabulary,
) -> TopKTokenStatistics | None:
    """Statistics of every valid token of this rank's replica, in the order of its rows; None off the last stage.

    One student forward without gradient, and where the run asks for it a second round of questions. Collective over
    the world.
    """
    groups = student.groups
    micro_batches = batch.micro_batches(groups.dp_rank)
    parts = teacher_rows.split(batch.num_rows()[groups.dp_rank]) if teacher_rows is not None else []
    found: list[StudentStatistics] = []

    def score(index: int, hidden_states: Tensor) -> None:
        mask = micro_batches[index].loss_mask
        found.append(
            student_statistics(
                (student.rows(hidden_states, mask), student.output_head),
                vocabulary,
                teacher_support_ids=parts[index].support_ids,
                labels=micro_batches[index].labels[mask],
            )
        )

    student.forward(micro_batches, score)
    own = StudentStatistics.concatenate(found) if groups.is_last_stage else None
    if teacher.asks_student_support:
        teacher_rows = teacher.about_student_support(batch, teacher_rows, own.support_ids if own else None)
    if own is None or teacher_rows is None:
        return None
    return combined_statistics(own, teacher_rows)


def served_loss(
    student: HiddenAndHead,
    vocabulary: ShardedVocabulary,
    teacher_rows: TeacherTopK,
    row_weights: Tensor,
    labels: Tensor,
    *,
    divergence: str,
) -> Tensor:
    """Returns the loss of selected rows: float32 scalar, equal on all tp ranks. See `topk_divergence_loss`."""
    ids, logprobs = known_ids(teacher_rows)
    return topk_divergence_loss(
        student,
        vocabulary,
        divergence=divergence,
        teacher_ids=ids,
        teacher_id_logprobs=logprobs,
        labels=labels,
        teacher_label_logprobs=teacher_rows.label_logprobs,
        row_weights=row_weights,
    )


def known_rows(
    statistics: TokenStatistics | None, teacher_rows: Tensor | TeacherTopK | None
) -> Tensor | TeacherTopK | None:
    """`teacher_rows`, with what the scoring pass learned besides."""
    learned = statistics.teacher if isinstance(statistics, TopKTokenStatistics) else None
    return learned or teacher_rows


def with_teachers(rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> list[Rollout]:
    """`rollouts` with the names of their prompts' teachers."""
    names = {prompt.index: prompt.teacher for prompt in prompts}
    return [replace(rollout, teacher=names.get(rollout.prompt_index) or rollout.teacher) for rollout in rollouts]


def tell_teachers(rollouts: list[Rollout], *, device: torch.device) -> list[Rollout]:
    """`rollouts` with the first process's names of their teachers. Two broadcasts over the world."""
    names = broadcast_json([rollout.teacher for rollout in rollouts], source=0, device=device)
    return [replace(rollout, teacher=name) for rollout, name in zip(rollouts, names, strict=True)]
