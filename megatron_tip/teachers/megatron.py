"""The frozen teacher: scores micro-batches in its own layout and hands its hidden states to the student's ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.models.hidden_states import exchange, masked_rows, plan_transfers, teacher_replica
from megatron_tip.models.pipeline import run_forward
from megatron_tip.parallel.groups import ModelGroups


@dataclass(frozen=True)
class Teacher:
    """A teacher in its own tp x pp layout.

    `output_head`: `[V_padded / student_tp, H]`, this rank's shard of the teacher's LM head, sharded over the
    *student's* tp group; None away from the student's last stage.
    """

    model: torch.nn.Module
    groups: ModelGroups
    student_groups: ModelGroups
    hidden_size: int
    output_head: Tensor | None

    @property
    def head(self) -> Tensor:
        """The LM head's shard; on the student's last stage only."""
        assert self.output_head is not None, "the teacher's head is on the student's last stage"
        return self.output_head

    def hidden_rows(self, batch: StepBatch) -> Tensor | None:
        """`[n, H]`: the teacher's hidden states of this rank's student replica, in the order of its rows.

        Held by the student's last-stage ranks, equal on all its tp ranks; None elsewhere. Hidden states travel, logits
        never do: H numbers a token instead of V. Collective over the world.
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
        return rows

    def _forward(self, batch: StepBatch) -> dict[tuple[int, int], Tensor]:
        """The `[n, H]` rows of the micro-batches that this rank's teacher replica serves, on its last stage."""
        grid, teacher = self.student_groups.grid, self.groups
        work = [
            (replica, index)
            for replica, micro_batches in enumerate(batch.plan)
            for index in range(len(micro_batches))
            if teacher_replica(replica, index, len(micro_batches), grid, teacher.grid) == teacher.dp_rank
        ]
        micro_batches = [batch.micro_batch(replica, index) for replica, index in work]
        rows: dict[tuple[int, int], Tensor] = {}

        def keep(index: int, hidden_states: Tensor) -> None:
            mask = micro_batches[index].loss_mask
            rows[work[index]] = masked_rows(hidden_states, mask, tp_group=teacher.tp_group, sequence_parallel=False)

        run_forward(self.model, teacher, micro_batches, keep)
        return rows
