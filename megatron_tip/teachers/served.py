"""A teacher behind servers: one rank per replica queries it and broadcasts the answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.context_parts import gathered_rows
from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config, LossConfig
from megatron_tip.models.student import Student
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.parallel.together import together
from megatron_tip.records import Rollout, TeacherTopK
from megatron_tip.rollout.sglang.client import SGLangClient, Timeouts
from megatron_tip.rollout.sglang.keys import read_keys
from megatron_tip.statistics import TokenStatistics
from megatron_tip.teachers.server_scorer import ScoringSettings, ServerTeacher
from megatron_tip.teachers.teacher import Teacher, TeacherSite, score_micro_batches
from megatron_tip.vocab_parallel import ShardedVocabulary
from megatron_tip.vocab_parallel.topk_divergence import topk_divergence_loss
from megatron_tip.vocab_parallel.topk_statistics import (
    StudentStatistics,
    combined_statistics,
    known_ids,
    student_statistics,
)

T = TypeVar("T")


@dataclass(frozen=True)
class ServedTeacher(Teacher[TeacherTopK]):
    """One or several teachers behind SGLang servers.

    In each replica of the student, the first rank of the last stage queries the servers about the replica's rollouts
    and broadcasts the answers; each context-parallel rank keeps those for its own rows. `scorer`: None except on the
    querying ranks. `groups`: the student's. `support_size`: K. `vocabulary`: the ids shared with the student.
    """

    heldout_statistic = "topk_reverse_kl"

    scorer: ServerTeacher | None
    groups: ModelGroups
    device: torch.device
    support_size: int
    asks_student_support: bool
    vocabulary: ShardedVocabulary
    settings: LossConfig

    def ask(self, batch: StepBatch) -> TeacherTopK | None:
        """Returns the teachers' log-probabilities for this rank's rows; see `Teacher.ask`.

        Raises:
            EngineError: no server answered one of the querying ranks; raised on every rank.
        """
        rollouts = _in_row_order(batch, self.groups.dp_rank)
        answer = self._asked(lambda scorer: scorer.top_k(rollouts, [rollout.teacher for rollout in rollouts]))
        if not self.groups.is_last_stage:
            return None
        n, k = sum(batch.num_replica_rows(self.groups.dp_rank)), self.support_size
        whole = TeacherTopK(
            label_logprobs=self._told(answer.label_logprobs if answer is not None else None, (n,), torch.float32),
            support_ids=self._told(answer.support_ids if answer is not None else None, (n, k), torch.int64),
            support_logprobs=self._told(answer.support_logprobs if answer is not None else None, (n, k), torch.float32),
        )
        return whole if self.groups.grid.cp_size == 1 else whole[self._is_own(batch)]

    def close(self) -> None:
        if self.scorer is not None:
            self.scorer.close()

    def score(
        self,
        student: Student,
        batch: StepBatch,
        rows: TeacherTopK | None,
        *,
        with_support: bool = False,
        held: list[Tensor] | None = None,
    ) -> tuple[TokenStatistics | None, TeacherTopK | None]:
        """Returns statistics and rows; see `Teacher.score`. Raises what `ask` raises.

        The rows also cover the student's top-K if the run asks about it. Supports are always included.
        """

        def score(hidden: Tensor, part: TeacherTopK, labels: Tensor) -> StudentStatistics:
            pair, ids = (hidden, student.output_head), part.support_ids
            return student_statistics(pair, self.vocabulary, teacher_support_ids=ids, labels=labels)

        found = score_micro_batches(student, batch, rows, score, _unknown, held=held)
        own = StudentStatistics.concatenate(found) if found else None
        if self.asks_student_support:
            rows = self._with_student_support(batch, rows, own.support_ids if own else None)
        if own is None or rows is None:
            return None, None
        return combined_statistics(own, rows), rows

    def loss(
        self,
        student: Student,
        hidden: Tensor,
        rows: TeacherTopK,
        labels: Tensor,
        row_weights: Tensor,
        divergence: str = "",
    ) -> Tensor:
        ids, logprobs = known_ids(rows)
        return topk_divergence_loss(
            (hidden, student.output_head),
            self.vocabulary,
            divergence=divergence or self.settings.divergence,
            teacher_ids=ids,
            teacher_id_logprobs=logprobs,
            labels=labels,
            teacher_label_logprobs=rows.label_logprobs,
            row_weights=row_weights,
        )

    def _with_student_support(
        self, batch: StepBatch, rows: TeacherTopK | None, ids: Tensor | None
    ) -> TeacherTopK | None:
        """Returns `rows` with the teachers' logprobs of the student's top-K `ids` `[n, K]`. Collective like `ask`."""
        rollouts = _in_row_order(batch, self.groups.dp_rank)
        whole = ids if ids is None else gathered_rows(ids, batch.row_owners(self.groups.dp_rank), self.groups.cp_group)

        def ask(scorer: ServerTeacher) -> Tensor:
            assert whole is not None, "scored on the last stage"
            return scorer.student_support(rollouts, [rollout.teacher for rollout in rollouts], whole)

        answer = self._asked(ask)
        if rows is None or ids is None or whole is None:
            return None
        logprobs = self._told(answer, tuple(whole.shape), torch.float32)
        own = logprobs if self.groups.grid.cp_size == 1 else logprobs[self._is_own(batch)]
        return replace(rows, student_support_ids=ids, student_support_logprobs=own)

    def _is_own(self, batch: StepBatch) -> Tensor:
        """Returns `[n]` bool: which rows of its replica this rank holds."""
        return batch.row_owners(self.groups.dp_rank) == self.groups.cp_rank

    def _asked(self, ask: Callable[[ServerTeacher], T]) -> T | None:
        """Returns the result of `ask` on the querying ranks, None elsewhere; raises its error on every rank."""
        answer = None
        with together(device=self.device):
            if self.scorer is not None:
                answer = ask(self.scorer)
        return answer

    def _told(self, values: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns the querying rank's `values` on all ranks of its replica's last stage. One broadcast."""
        told = torch.empty(shape, dtype=dtype, device=self.device)
        if values is not None:
            assert values.shape == shape, f"{list(values.shape)} for rows {list(shape)}"
            told.copy_(values)
        source = dist.get_global_rank(self.groups.tp_cp_group, 0)
        dist.broadcast(told, src=source, group=self.groups.tp_cp_group)
        return told


def _in_row_order(batch: StepBatch, replica: int) -> list[Rollout]:
    """Returns the replica's rollouts in the order of its rows, their generated tokens, as the teacher reads them."""
    places = [place for micro_batch in batch.plan[replica] for place in micro_batch]
    return [batch.rollouts[place].as_the_teacher_reads_it() for place in places]


def _unknown(rows: TeacherTopK) -> StudentStatistics:
    """Returns NaN for rows whose student logits are not finite, with the teacher's ids in place of the student's."""
    nothing, nowhere = (torch.full_like(values, torch.nan) for values in (rows.label_logprobs, rows.support_logprobs))
    return StudentStatistics(nothing, nothing, rows.support_ids, nowhere, nowhere)


def build(config: Config, site: TeacherSite) -> ServedTeacher:
    """Builds the teacher; the querying ranks check its servers. Collective over the world.

    Raises:
        ServerMismatchError: a server cannot score for this run.
        ServerError: a server does not answer.
    """
    groups, vocab_size = site.student_groups, site.vocabulary.vocab_size
    assert vocab_size is not None, "a run's vocabulary has a known size"
    scorer = None
    with together(device=site.device):
        if groups.is_last_stage and groups.tp_rank == groups.cp_rank == 0:
            scorer = _scorer(config, vocab_size)
    return ServedTeacher(
        scorer=scorer,
        groups=groups,
        device=site.device,
        support_size=min(config.selection.support_size, vocab_size),
        asks_student_support=config.teacher.student_support == "ask",
        vocabulary=site.vocabulary,
        settings=config.loss,
    )


def _scorer(config: Config, vocab_size: int) -> ServerTeacher:
    teacher = config.teacher
    keys = read_keys(teacher.keys_file, setting="teacher.keys_file")
    timeouts = Timeouts(silence=teacher.timeout_seconds)
    routes: dict[str, list[SGLangClient]] = {}
    for name, url in teacher.routes:
        client = SGLangClient(url, vocab_size=vocab_size, keys=keys, timeouts=timeouts)
        routes.setdefault(name, []).append(client)
    settings = ScoringSettings(
        vocab_size=vocab_size,
        support_size=min(config.selection.support_size, vocab_size),
        window_tokens=teacher.window_tokens,
        max_concurrent=teacher.max_concurrent,
        wait_seconds=teacher.wait_seconds,
    )
    scorer = ServerTeacher(routes, settings)
    scorer.check(asks_student_support=teacher.student_support == "ask")
    return scorer
