"""A frozen teacher in the trainer's own processes, which sends its hidden states to the student's ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_tip.batching.context_parts import context_part
from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config, LossConfig
from megatron_tip.conversion.bridge import load_hf, load_output_head
from megatron_tip.models.gpt import build_gpt
from megatron_tip.models.hidden_states import Piece, exchange, masked_rows, plan_transfers, teacher_replica
from megatron_tip.models.pipeline import run_forward, token_multiple
from megatron_tip.models.student import Student
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import TeacherRows
from megatron_tip.statistics import TokenStatistics
from megatron_tip.teachers.setup import splits_sequence
from megatron_tip.teachers.teacher import Teacher, TeacherSite, score_micro_batches
from megatron_tip.vocab_parallel import ShardedVocabulary, divergence_loss, padded_vocab_size, token_statistics

FP8_TOKENS = 16
"""Transformer Engine's 8-bit products take a multiple of these rows."""


@dataclass(frozen=True)
class HiddenRows(TeacherRows):
    """The teacher's last hidden states of n rows: `states` `[n, H]`."""

    states: Tensor


@dataclass(frozen=True)
class MegatronTeacher(Teacher[HiddenRows]):
    """A teacher in its own tp x cp x pp layout.

    `output_head`: `[V_padded / student_tp, H]`, this rank's shard of the teacher's LM head, sharded over the
    *student's* tp group; None except on the student's last stage. `vocabulary`: the ids shared with the student.
    `support_size`: K. `with_jsd`: whether the run's rule reads the JSD.
    """

    heldout_statistic = "reverse_kl"

    model: torch.nn.Module
    groups: ModelGroups
    student_groups: ModelGroups
    hidden_size: int
    output_head: Tensor | None
    vocabulary: ShardedVocabulary
    support_size: int
    with_jsd: bool
    settings: LossConfig

    @property
    def head(self) -> Tensor:
        """The shard of the LM head; on the student's last stage only."""
        assert self.output_head is not None, "the teacher's head is on the student's last stage"
        return self.output_head

    @property
    def sequence_multiple(self) -> int:
        return self.groups.grid.sequence_multiple

    @property
    def token_multiple(self) -> int:
        in_8_bits = get_model_config(self.model).fp8 is not None
        return math.lcm(token_multiple(self.model), FP8_TOKENS * self.groups.grid.cp_size if in_8_bits else 1)

    def tensors(self) -> dict[str, list[Tensor]]:
        head = [self.output_head] if self.output_head is not None else []
        return {"teacher": list(self.model.parameters()), "head": head}

    def ask(self, batch: StepBatch) -> HiddenRows | None:
        """Returns the hidden states for this rank's student replica; see `Teacher.ask`.

        Ranks exchange hidden states instead of logits: H numbers per token, not V.
        """
        outgoing = self._forward(batch)
        student, grid = self.student_groups, self.groups.grid
        counts = batch.num_rows_by_part(grid.cp_size)
        transfers = plan_transfers(counts, student.grid, grid)
        if not student.is_last_stage:
            exchange(outgoing, {}, transfers)
            return None
        own_rows = batch.num_rows()[student.dp_cp_rank]
        rows = next(self.model.parameters()).new_empty(sum(own_rows), self.hidden_size)
        parts = rows.split(own_rows)
        incoming = self._buffers(batch, counts[student.dp_rank], parts)
        exchange(outgoing, incoming, transfers)
        if not self._holds_the_same_rows(batch):
            for piece, buffer in incoming.items():
                parts[piece.micro_batch][self._held_by_teacher(batch, piece)] = buffer
        return HiddenRows(rows)

    def _holds_the_same_rows(self, batch: StepBatch) -> bool:
        """Returns whether both models cut sequences into the same parts: a prompt of the teacher's own moves chunks."""
        cp_size = self.groups.grid.cp_size
        return cp_size == self.student_groups.grid.cp_size and (cp_size == 1 or not batch.teacher_reads_another)

    def _buffers(self, batch: StepBatch, counts: list[list[list[int]]], parts: Sequence[Tensor]) -> dict[Piece, Tensor]:
        """Returns where this rank receives its rows: in `parts`, by micro-batch, if both models cut sequences alike.

        Otherwise a part comes in pieces, whose rows are not neighbours. `counts`: of this replica's rows, by
        micro-batch, student's and teacher's context-parallel rank.
        """
        replica, cp_rank = self.student_groups.dp_rank, self.student_groups.cp_rank
        if self._holds_the_same_rows(batch):
            return {Piece(replica, index, cp_rank, cp_rank): part for index, part in enumerate(parts)}
        return {
            Piece(replica, index, cp_rank, other): part.new_empty(rows, self.hidden_size)
            for index, part in enumerate(parts)
            for other, rows in enumerate(counts[index][cp_rank])
        }

    def _held_by_teacher(self, batch: StepBatch, piece: Piece) -> Tensor:
        """Returns which rows of the student's part of a micro-batch the piece has: bool."""
        owners = batch.teachers_of_rows(piece.replica, piece.micro_batch, self.groups.grid.cp_size)
        return owners[batch.owners_of_rows(piece.replica, piece.micro_batch) == piece.student_cp] == piece.teacher_cp

    def _pieces(self, batch: StepBatch, replica: int, index: int, rows: Tensor) -> dict[Piece, Tensor]:
        """Returns this rank's `rows` of a micro-batch by the student's context-parallel rank that needs them."""
        cp_size, cp_rank = self.groups.grid.cp_size, self.groups.cp_rank
        if self._holds_the_same_rows(batch):
            return {Piece(replica, index, cp_rank, cp_rank): rows}
        owners = batch.owners_of_rows(replica, index)[batch.teachers_of_rows(replica, index, cp_size) == cp_rank]
        students = range(self.student_groups.grid.cp_size)
        return {Piece(replica, index, student, cp_rank): rows[owners == student] for student in students}

    def _forward(self, batch: StepBatch) -> dict[Piece, Tensor]:
        """Returns the `[n, H]` rows of the micro-batches that this rank's teacher replica serves, on its last stage."""
        teacher = self.groups
        own_part = {"cp_size": teacher.grid.cp_size, "cp_rank": teacher.cp_rank}
        parts = [
            (place, context_part(part, **own_part))
            for place in self.served(batch)
            for part in batch.as_the_teacher_reads_it(*place)
        ]
        found: dict[tuple[int, int], list[Tensor]] = {}

        def keep(index: int, hidden_states: Tensor) -> None:
            place, part = parts[index]
            kept = masked_rows(
                hidden_states,
                part.loss_mask,
                tp_group=teacher.tp_group,
                sequence_parallel=get_model_config(self.model).sequence_parallel,
            )
            found.setdefault(place, []).append(kept)

        run_forward(self.model, teacher, [part for _, part in parts], keep)
        rows: dict[Piece, Tensor] = {}
        for place, own in found.items():
            rows.update(self._pieces(batch, *place, torch.cat(own) if len(own) > 1 else own[0]))
        return rows

    def served(self, batch: StepBatch) -> list[tuple[int, int]]:
        """Returns the (replica, micro-batch) pairs that this rank's teacher replica serves."""
        return [place for place, replica in self.serving(batch).items() if replica == self.groups.dp_rank]

    def serving(self, batch: StepBatch) -> dict[tuple[int, int], int]:
        """Returns which teacher replica serves each (replica, micro-batch) pair."""
        student, teacher = self.student_groups.grid, self.groups.grid
        return {
            (replica, index): teacher_replica(replica, index, len(micro_batches), student, teacher)
            for replica, micro_batches in enumerate(batch.plan)
            for index in range(len(micro_batches))
        }

    def score(
        self,
        student: Student,
        batch: StepBatch,
        rows: HiddenRows | None,
        *,
        with_support: bool = False,
        held: list[Tensor] | None = None,
    ) -> tuple[TokenStatistics | None, HiddenRows | None]:
        def score(hidden: Tensor, part: HiddenRows, labels: Tensor) -> TokenStatistics:
            return self.statistics(student, hidden, part, labels, with_support=with_support)

        def unknown(part: HiddenRows) -> TokenStatistics:
            return TokenStatistics.unknown(len(part), part.states.device)

        found = score_micro_batches(student, batch, rows, score, unknown, held=held)
        return TokenStatistics.concatenate(found) if found else None, rows

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
        return token_statistics(
            (hidden, student.output_head),
            (rows.states, self.head),
            self.vocabulary,
            labels=labels,
            support_size=support_size or self.support_size,
            with_jsd=self.with_jsd,
            with_support=with_support,
        )

    def loss(
        self,
        student: Student,
        hidden: Tensor,
        rows: HiddenRows,
        labels: Tensor,
        row_weights: Tensor,
        divergence: str = "",
    ) -> Tensor:
        return divergence_loss(
            (hidden, student.output_head),
            (rows.states, self.head),
            self.vocabulary,
            divergence=divergence or self.settings.divergence,
            row_weights=row_weights,
            labels=labels,
            jsd_beta=self.settings.jsd_beta,
        )


def build(config: Config, site: TeacherSite) -> MegatronTeacher:
    """Builds the teacher and loads its weights. Collective over the world.

    Raises:
        WeightsError: the weights are incomplete or damaged.
    """
    checkpoint, groups, student = site.checkpoint, site.groups, site.student_groups
    assert checkpoint is not None, "the plan opens the checkpoint of a teacher in the trainer's own processes"
    architecture = checkpoint.architecture
    model = build_gpt(
        architecture,
        groups,
        padded_vocab_size=padded_vocab_size(architecture.vocab_size, groups.grid.tp_size),
        dtype=site.dtype,
        transformer_impl=config.teacher.transformer_impl,
        sequence_parallel=splits_sequence(config, architecture),
        fp8=config.teacher.fp8,
        trainable=False,
    )
    load_hf(model, checkpoint, groups)
    output_head = None
    if student.is_last_stage:
        output_head = load_output_head(
            checkpoint,
            tp_rank=student.tp_rank,
            tp_size=student.grid.tp_size,
            padded_vocab_size=site.padded_vocab_size,
            dtype=site.dtype,
        ).to(site.device)
    return MegatronTeacher(
        model=model,
        groups=groups,
        student_groups=student,
        hidden_size=architecture.hidden_size,
        output_head=output_head,
        vocabulary=site.vocabulary,
        support_size=config.selection.support_size,
        with_jsd="jsd" in site.required_statistics,
        settings=config.loss,
    )
