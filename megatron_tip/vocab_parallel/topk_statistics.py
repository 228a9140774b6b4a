"""Per-token statistics of student p and a teacher q with only some known log-probabilities."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megatron_tip.errors import InputError
from megatron_tip.records import TeacherTopK
from megatron_tip.statistics import STATISTICS, TokenStatistics
from megatron_tip.vocab_parallel import kernels
from megatron_tip.vocab_parallel.chunks import Chunk
from megatron_tip.vocab_parallel.inputs import HiddenAndHead, checked_inputs
from megatron_tip.vocab_parallel.softmax_normaliser import SoftmaxNormaliser
from megatron_tip.vocab_parallel.statistics import support_statistics
from megatron_tip.vocab_parallel.topk import exchange_topk
from megatron_tip.vocab_parallel.topk_divergence import NO_ID, teacher_log_tail
from megatron_tip.vocab_parallel.vocabulary import ShardedVocabulary

TOPK_STATISTICS = frozenset(
    name for name, statistic in STATISTICS.items() if statistic.needs in ("nothing", "top_k", "top_k_alone")
)
"""The statistics available from a teacher's top-K alone, so without those of `needs="student_top_k"`."""

ON_STUDENT_SUPPORT = frozenset(name for name, statistic in STATISTICS.items() if statistic.needs == "student_top_k")
"""The statistics that also need the teacher's logprobs of the student's top-K."""

# Stands for ln q if q counts as zero: finite to avoid 0 x inf, and exactly zero after exp.
_NOTHING = -1e4


@dataclass(frozen=True)
class StudentStatistics:
    """The student's part of the statistics of n rows, equal on all tp ranks; natural logs.

    `entropy`, `label_logprobs`: `[n]` float32. `support_ids`, `support_logprobs`: `[n, K]`, its top-K, ties by lower
    id. `teacher_support_logprobs`: `[n, K]`, its logprobs of the teacher's top-K.
    """

    entropy: Tensor
    label_logprobs: Tensor
    support_ids: Tensor
    support_logprobs: Tensor
    teacher_support_logprobs: Tensor

    @staticmethod
    def concatenate(parts: "list[StudentStatistics]") -> "StudentStatistics":
        """Returns the rows of all `parts`, in order."""
        names = [field.name for field in fields(StudentStatistics)]
        return StudentStatistics(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@torch.no_grad()
def student_statistics(
    student: HiddenAndHead, vocabulary: ShardedVocabulary, *, teacher_support_ids: Tensor, labels: Tensor
) -> StudentStatistics:
    """Returns the `StudentStatistics` of n rows, for a support of the same size as the teacher's.

    Args:
        student, vocabulary: as in `token_statistics`.
        teacher_support_ids: `[n, K]` int64, distinct. labels: `[n]` int64.

    Collectives: 1 all-gather per chunk, and 1 of 40 bytes per call.

    Raises:
        InputError: arguments do not match, or logits are not finite; on all ranks.
    """
    n, ids = len(student[0]), teacher_support_ids
    if ids.dim() != 2 or len(ids) != n or ids.dtype != torch.int64:
        raise InputError(
            f"student_statistics: expected teacher_support_ids [{n}, K] torch.int64, got {list(ids.shape)} {ids.dtype}."
        )
    inputs = checked_inputs("student_statistics", (student,), vocabulary, labels=labels)
    parts = [_chunk_statistics(chunk, ids[chunk.rows], labels[chunk.rows]) for chunk in inputs.chunks()]
    result = StudentStatistics.concatenate(parts)
    inputs.check_finite(result.entropy)
    return result


def combined_statistics(student: StudentStatistics, teacher: TeacherTopK) -> TokenStatistics:
    """Returns the statistics of student and teacher; arithmetic on `[n, K]`, no collective.

    If the teacher was not asked about the student's top-K, C is None, and D counts its unknown mass there as zero, like
    the lower bound of C (TA-OPD Eq. 17).
    """
    q_on_s = teacher_on_student_support(student.support_ids, teacher)
    supports: dict[str, Any] = support_statistics(
        student.support_logprobs,
        q_on_s,
        student.support_ids,
        student.teacher_support_logprobs,
        teacher.support_logprobs,
        teacher.support_ids,
    )
    if teacher.student_support_logprobs is None:
        supports["compatibility"] = None
    ids, q = known_ids(teacher)
    p = torch.cat([student.teacher_support_logprobs, student.support_logprobs], 1)[:, : ids.shape[1]]
    return TokenStatistics(
        student_entropy=student.entropy,
        teacher_entropy=None,
        reverse_kl=None,
        forward_kl=None,
        **supports,
        student_logprobs=student.label_logprobs,
        teacher_logprobs=teacher.label_logprobs,
        student_support_ids=student.support_ids,
        student_support_logprobs=student.support_logprobs,
        teacher_support_ids=teacher.support_ids,
        teacher_support_logprobs=teacher.support_logprobs,
        topk_reverse_kl=_topk_reverse_kl(p, q, ids != NO_ID),
    )


def known_ids(teacher: TeacherTopK) -> tuple[Tensor, Tensor]:
    """Returns `[n, m]` ids with known q, duplicates replaced by -1, and their ln q, for `topk_divergence_loss`.

    They are the teacher's top-K, followed by the student's if the teacher was asked about it.
    """
    if teacher.student_support_ids is None or teacher.student_support_logprobs is None:
        return teacher.support_ids, teacher.support_logprobs
    twice = (teacher.student_support_ids.unsqueeze(2) == teacher.support_ids.unsqueeze(1)).any(2)
    ids = torch.cat([teacher.support_ids, teacher.student_support_ids.masked_fill(twice, NO_ID)], 1)
    return ids, torch.cat([teacher.support_logprobs, teacher.student_support_logprobs], 1)


def teacher_on_student_support(student_support_ids: Tensor, teacher: TeacherTopK) -> Tensor:
    """Returns `[n, K]` ln q of the student's top-K: the teacher's answer, or else its top-K with no mass outside."""
    if teacher.student_support_logprobs is not None:
        return teacher.student_support_logprobs
    same = student_support_ids.unsqueeze(2) == teacher.support_ids.unsqueeze(1)
    return torch.where(same, teacher.support_logprobs.unsqueeze(1), _NOTHING).amax(2)


def _topk_reverse_kl(p: Tensor, q: Tensor, is_known: Tensor) -> Tensor:
    """Returns `[n]` Σ of p ln(p / q) over the known ids and the tail, from `[n, m]` logprobs."""
    terms = torch.where(is_known, p.exp() * (p - q), 0.0).sum(-1)
    mass = torch.where(is_known, p.double().exp(), 0.0).sum(-1)
    tail = (1 - mass).clamp(min=0)
    on_tail = torch.special.xlogy(tail, tail) - tail * teacher_log_tail(q, is_known)
    return (terms + on_tail.float()).clamp(min=0)


def _chunk_statistics(chunk: Chunk, teacher_ids: Tensor, labels: Tensor) -> StudentStatistics:
    (z,), partition, k = chunk.logits, chunk.partition, teacher_ids.shape[1]
    wanted = torch.cat([labels.unsqueeze(1), teacher_ids], 1)
    owned, _ = partition.owned(z, wanted)
    sums, groups = chunk.blocks.run(kernels.entropy_and_topk_sums, z)
    gathered, ((top, ids),) = exchange_topk([z], [groups], torch.cat([sums, owned], 1), k, partition)
    normaliser = SoftmaxNormaliser.of(gathered[..., :1], gathered[..., 1:2])
    looked_up = normaliser.logprobs(gathered[..., 3:].sum(0), 0)  # one rank owns an id, the others hold zero
    entropy = -normaliser.expectation(0, gathered[..., 1], gathered[..., 2], -normaliser.lse[..., 0])
    return StudentStatistics(
        entropy=entropy.clamp(min=0),
        label_logprobs=looked_up[:, 0],
        support_ids=ids,
        support_logprobs=normaliser.logprobs(top, 0),
        teacher_support_logprobs=looked_up[:, 1:],
    )
