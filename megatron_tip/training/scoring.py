"""What the teacher says of the valid tokens, and their statistics."""

from __future__ import annotations

from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.errors import NotFiniteError
from megatron_tip.records import MicroBatch, TeacherRows, TeacherTopK, TokenStatistics
from megatron_tip.teachers.megatron import Teacher
from megatron_tip.teachers.served import served_statistics
from megatron_tip.training.run import TrainingRun
from megatron_tip.vocab_parallel import token_statistics


def ask_teacher(run: TrainingRun, batch: StepBatch) -> TeacherRows | None:
    """What the teacher says of this rank's replica, in the order of its rows; on the last stage, None elsewhere.

    Collective over the world.
    """
    return run.teacher.hidden_rows(batch) if isinstance(run.teacher, Teacher) else run.teacher.topk_rows(batch)


def score_tokens(
    run: TrainingRun, batch: StepBatch, teacher_rows: TeacherRows | None, *, with_support: bool = False
) -> TokenStatistics | None:
    """Statistics of every valid token of this rank's replica, in the order of its rows; on the last stage only.

    `with_support`: also the top-K of both models, which `TopKTokenStatistics` always has.

    One forward pass without gradient. What is alive at once is a micro-batch's hidden states and a chunk of logits.
    """
    groups, teacher = run.student.groups, run.teacher
    if not isinstance(teacher, Teacher):
        assert not isinstance(teacher_rows, Tensor), "servers give log-probabilities"
        return served_statistics(run.student, teacher, batch, teacher_rows, run.vocabulary)
    assert not isinstance(teacher_rows, TeacherTopK), "the teacher at hand gives hidden states"
    micro_batches = batch.micro_batches(groups.dp_rank)
    teacher_parts = teacher_rows.split(batch.num_rows()[groups.dp_rank]) if teacher_rows is not None else ()
    parts: list[TokenStatistics] = []

    def score(index: int, hidden_states: Tensor) -> None:
        try:
            statistics = micro_batch_statistics(
                run, teacher, micro_batches[index], hidden_states, teacher_parts[index], with_support=with_support
            )
        except NotFiniteError:  # alike on all tp ranks; the other replicas and stages must not be left alone
            statistics = TokenStatistics.unknown(len(teacher_parts[index]), run.device)
        parts.append(statistics)

    run.student.forward(micro_batches, score)
    return TokenStatistics.concatenate(parts) if groups.is_last_stage else None


def micro_batch_statistics(
    run: TrainingRun,
    teacher: Teacher,
    micro_batch: MicroBatch,
    hidden_states: Tensor,
    teacher_hidden: Tensor,
    *,
    support_size: int | None = None,
    with_support: bool = False,
) -> TokenStatistics:
    """Statistics of one micro-batch's valid tokens, `[n]`, equal on all tp ranks of the last stage; no gradient.

    Args:
        hidden_states: the student's last output, `[s, b, h]` (`[s/tp, b, h]` under sequence parallelism), detached.
        teacher_hidden: `[n, H]`.
        support_size: K; None: the configuration's.
        with_support: with the ids of both models' supports and their logprobs.
    """
    return token_statistics(
        (run.student.rows(hidden_states, micro_batch.loss_mask), run.student.output_head),
        (teacher_hidden, teacher.head),
        run.vocabulary,
        labels=micro_batch.labels[micro_batch.loss_mask],
        support_size=support_size or run.config.selection.support_size,
        with_jsd="jsd" in run.selector.required_statistics,
        with_support=with_support,
    )
