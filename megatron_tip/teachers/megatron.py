"""A frozen teacher in the trainer's own processes, which sends its hidden states to the student's ranks."""

from dataclasses import dataclass

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config, LossConfig
from megatron_tip.conversion.bridge import load_hf, load_output_head
from megatron_tip.models.gpt import build_gpt
from megatron_tip.models.hidden_states import exchange, masked_rows, plan_transfers, teacher_replica
from megatron_tip.models.pipeline import run_forward, token_multiple
from megatron_tip.models.student import Student
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import TeacherRows
from megatron_tip.statistics import TokenStatistics
from megatron_tip.teachers.teacher import Teacher, TeacherSite, score_micro_batches
from megatron_tip.vocab_parallel import ShardedVocabulary, divergence_loss, padded_vocab_size, token_statistics


@dataclass(frozen=True)
class HiddenRows(TeacherRows):
    """The teacher's last hidden states of n rows: `states` `[n, H]`."""

    states: Tensor


@dataclass(frozen=True)
class MegatronTeacher(Teacher[HiddenRows]):
    """A teacher in its own tp x pp layout.

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
    def token_multiple(self) -> int:
        return token_multiple(self.model)

    def tensors(self) -> dict[str, list[Tensor]]:
        head = [self.output_head] if self.output_head is not None else []
        return {"teacher": list(self.model.parameters()), "head": head}

    def ask(self, batch: StepBatch) -> HiddenRows | None:
        """Returns the hidden states for this rank's student replica; see `Teacher.ask`.

        Ranks exchange hidden states instead of logits: H numbers per token, not V.
        """
        outgoing = self._forward(batch)
        student = self.student_groups
        num_rows = batch.num_rows()
        rows, incoming = None, {}
        if student.is_last_stage:
            own_rows = num_rows[student.dp_rank]
            parameter = next(self.model.parameters())
            rows = parameter.new_empty(sum(own_rows), self.hidden_size)
            incoming = {(student.dp_rank, index): part for index, part in enumerate(rows.split(own_rows))}
        exchange(outgoing, incoming, plan_transfers(num_rows, student.grid, self.groups.grid))
        return HiddenRows(rows) if rows is not None else None

    def _forward(self, batch: StepBatch) -> dict[tuple[int, int], Tensor]:
        """Returns the `[n, H]` rows of the micro-batches that this rank's teacher replica serves, on its last stage."""
        grid, teacher = self.student_groups.grid, self.groups
        work = [
            (replica, index)
            for replica, micro_batches in enumerate(batch.plan)
            for index in range(len(micro_batches))
            if teacher_replica(replica, index, len(micro_batches), grid, teacher.grid) == teacher.dp_rank
        ]
        parts = [(place, part) for place in work for part in batch.as_the_teacher_reads_it(*place)]
        rows: dict[tuple[int, int], list[Tensor]] = {}

        def keep(index: int, hidden_states: Tensor) -> None:
            place, part = parts[index]
            kept = masked_rows(
                hidden_states,
                part.loss_mask,
                tp_group=teacher.tp_group,
                sequence_parallel=get_model_config(self.model).sequence_parallel,
            )
            rows.setdefault(place, []).append(kept)

        run_forward(self.model, teacher, [part for _, part in parts], keep)
        return {place: torch.cat(found) if len(found) > 1 else found[0] for place, found in rows.items()}

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
        # Otherwise every tensor-parallel rank would send all tokens to the experts.
        sequence_parallel=architecture.experts is not None,
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
