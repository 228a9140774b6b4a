"""A step's rollouts, laid out in micro-batches over the student's data-parallel replicas and their parts."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from megatron_tip.batching.context_parts import context_part, owner_of_chunk, token_owners
from megatron_tip.batching.micro_batches import (
    MicroBatchPlan,
    aligned_length,
    build_micro_batch,
    num_kept_tokens,
    num_padding_tokens,
    plan_micro_batches,
    token_index,
)
from megatron_tip.records import MicroBatch, Rollout, TokenIndex


@dataclass(frozen=True)
class StepBatch:
    """The assignment of a step's rollouts to replicas and micro-batches; every rank holds it all: token ids are small.

    `plan`: replica -> micro-batch -> places in `rollouts`. `num_kept_tokens`: how many leading tokens of each rollout
    go through the model. `token_multiple`, `sequence_multiple`: a micro-batch and each of its sequences are padded to
    multiples of them. `cp_size`: of the student. A replica's rows are held by its context-parallel ranks in parts; an
    argument `rank` is a place in the student's dp x cp group (`ModelGroups.dp_cp_rank`). Micro-batches and token
    indices are built once and shared by the stages of a step.
    """

    rollouts: Sequence[Rollout]
    plan: MicroBatchPlan
    num_kept_tokens: list[int]
    max_tokens: int
    pad_token_id: int
    token_multiple: int
    device: torch.device
    sequence_multiple: int = 1
    cp_size: int = 1
    _whole: dict[tuple[int, int], MicroBatch] = field(default_factory=dict, init=False, repr=False, compare=False)
    _of_teacher: dict[tuple[int, int], list[MicroBatch]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _parts: dict[int, list[MicroBatch]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _indices: dict[int, TokenIndex] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def over(
        cls,
        rollouts: Sequence[Rollout],
        *,
        dp_size: int,
        max_tokens: int,
        pad_token_id: int,
        token_multiple: int,
        device: torch.device,
        sequence_multiple: int = 1,
        cp_size: int = 1,
    ) -> "StepBatch":
        """Returns a batch of all tokens of `rollouts`, balanced over `dp_size` replicas; the same on every rank."""
        lengths = num_kept_tokens(rollouts, [len(rollout.response_ids) - 1 for rollout in rollouts])
        token_multiple = math.lcm(token_multiple, sequence_multiple)
        plan = _plan(lengths, dp_size, max_tokens, token_multiple, sequence_multiple)
        return cls(
            rollouts, plan, lengths, max_tokens, pad_token_id, token_multiple, device, sequence_multiple, cp_size
        )

    def micro_batch(self, replica: int, index: int) -> MicroBatch:
        """Returns a micro-batch of a replica with all of its tokens."""
        if (replica, index) not in self._whole:
            self._whole[replica, index] = build_micro_batch(
                self.rollouts,
                self.plan[replica][index],
                self.pad_token_id,
                token_multiple=self.token_multiple,
                sequence_multiple=self.sequence_multiple,
                num_kept_tokens=self.num_kept_tokens,
            ).to(self.device)
        return self._whole[replica, index]

    def as_the_teacher_reads_it(self, replica: int, index: int) -> list[MicroBatch]:
        """Returns the micro-batch with the teacher's prompts, cut into several where those make it too long.

        Together they have the rows of the student's micro-batch, in its order.
        """
        if (replica, index) not in self._of_teacher:
            self._of_teacher[replica, index] = self._with_prompts_of_teacher(self.plan[replica][index]) or [
                self.micro_batch(replica, index)
            ]
        return self._of_teacher[replica, index]

    def _with_prompts_of_teacher(self, places: Sequence[int]) -> list[MicroBatch]:
        """Returns a micro-batch's rollouts as the teacher reads them; nothing if it reads what the student reads."""
        if not any(len(self.rollouts[place].teacher_prompt_ids) for place in places):
            return []
        rollouts, kept = self._as_the_teacher_reads_them
        capacity = self.max_tokens - self.max_tokens % self.token_multiple
        parts: list[list[int]] = [[]]
        for place in places:
            if parts[-1] and sum(self._aligned(kept[one]) for one in (*parts[-1], place)) > capacity:
                parts.append([])
            parts[-1].append(place)
        built = (
            build_micro_batch(
                rollouts,
                part,
                self.pad_token_id,
                token_multiple=self.token_multiple,
                sequence_multiple=self.sequence_multiple,
                num_kept_tokens=kept,
            )
            for part in parts
        )
        return [micro_batch.to(self.device) for micro_batch in built]

    def micro_batches(self, rank: int) -> list[MicroBatch]:
        """Returns the part of its replica's micro-batches that `rank` holds."""
        if rank not in self._parts:
            replica, cp_rank = divmod(rank, self.cp_size)
            whole = [self.micro_batch(replica, index) for index in range(len(self.plan[replica]))]
            self._parts[rank] = [context_part(one, cp_size=self.cp_size, cp_rank=cp_rank) for one in whole]
        return self._parts[rank]

    def num_rows(self) -> list[list[int]]:
        """Returns the number of valid tokens by rank and micro-batch."""
        parts = self.num_rows_by_part(1)
        return [[part[cp_rank][0] for part in own] for own in parts for cp_rank in range(self.cp_size)]

    def num_replica_rows(self, replica: int) -> list[int]:
        """Returns the number of valid tokens of each of a replica's micro-batches, over all of its parts."""
        return [sum(map(self._num_rows, places)) for places in self.plan[replica]]

    def num_rows_by_part(self, teacher_cp_size: int) -> list[list[list[list[int]]]]:
        """Returns numbers of valid tokens, `[replica][micro-batch][cp_size][teacher_cp_size]`.

        One for each pair of a rank of the student's and a rank of the teacher's context-parallel group: the tokens that
        both hold, each in its part of what its model reads.
        """
        owners = [owner_of_chunk(torch.arange(2 * n), n).tolist() for n in (self.cp_size, teacher_cp_size)]
        rollouts, kept = self._as_the_teacher_reads_them

        def counted(places: Sequence[int]) -> list[list[int]]:
            counts = [[0] * teacher_cp_size for _ in range(self.cp_size)]
            for place in places:
                own = self._rows_before_chunks(self.rollouts[place], self.num_kept_tokens[place], self.cp_size)
                other = self._rows_before_chunks(rollouts[place], kept[place], teacher_cp_size)
                for start, end in pairwise(sorted({*own, *other})):
                    student, teacher = (
                        of_chunk[bisect_right(edges, start) - 1]
                        for of_chunk, edges in zip(owners, (own, other), strict=True)
                    )
                    counts[student][teacher] += end - start
            return counts

        return [list(map(counted, micro_batches)) for micro_batches in self.plan]

    def owners_of_rows(self, replica: int, index: int) -> Tensor:
        """Returns `[n]` int64: which of the student's context-parallel ranks holds each row of a micro-batch."""
        return self._owners(self.micro_batch(replica, index), self.cp_size)

    def teachers_of_rows(self, replica: int, index: int, teacher_cp_size: int) -> Tensor:
        """Returns `[n]` int64: which of the teacher's context-parallel ranks holds each row of a micro-batch."""
        read = self.as_the_teacher_reads_it(replica, index)
        return torch.cat([self._owners(micro_batch, teacher_cp_size) for micro_batch in read])

    def _owners(self, micro_batch: MicroBatch, cp_size: int) -> Tensor:
        return token_owners(micro_batch.lengths, cp_size).to(self.device)[micro_batch.loss_mask]

    def row_owners(self, replica: int) -> Tensor:
        """Returns `[n]` int64: which context-parallel rank holds each row of a replica, in the replica's order."""
        return torch.cat([self.owners_of_rows(replica, index) for index in range(len(self.plan[replica]))])

    def num_valid(self) -> int:
        """Returns the number of valid tokens of the whole batch."""
        return sum(map(self._num_rows, range(len(self.rollouts))))

    def num_model_tokens(self) -> int:
        """Returns the number of tokens of the whole batch that go through the model, without padding."""
        return sum(self.num_kept_tokens[place] for replica in self.plan for places in replica for place in places)

    def num_teacher_tokens(self) -> int:
        """Returns the number of tokens of the whole batch that the teacher reads, without padding."""
        _, kept = self._as_the_teacher_reads_them
        return sum(kept[place] for replica in self.plan for places in replica for place in places)

    def num_padded_tokens(self) -> list[int]:
        """Returns the number of tokens that go through the model on each replica, with padding."""
        return [sum(map(self._num_padded, replica)) for replica in self.plan]

    def num_micro_batches(self) -> int:
        """Returns the number of micro-batches of the whole batch, empty ones included."""
        return sum(map(len, self.plan))

    def token_index(self, rank: int) -> TokenIndex:
        """Returns where each row that `rank` holds stands in the whole batch."""
        if rank not in self._indices:
            self._indices[rank] = token_index(self.micro_batches(rank))
        return self._indices[rank]

    def replica_index(self, replica: int) -> TokenIndex:
        """Returns where each row of the replica, all of its parts together, stands in the whole batch."""
        if self.cp_size == 1:
            return self.token_index(replica)
        return token_index([self.micro_batch(replica, index) for index in range(len(self.plan[replica]))])

    def cut_after(self, last_selected: Sequence[int]) -> "StepBatch":
        """Returns the batch without what cannot influence the loss, redistributed over the same replicas.

        Attention is causal: tokens after a rollout's last selected position change neither loss nor gradient. They are
        cut off, rollouts with nothing selected are dropped, and the rest is balanced over the replicas again, in fewer
        micro-batches. A pure function, the same on every rank.

        Args:
            last_selected: by place in `rollouts`, the last selected position of the response; -1: none.
        """
        lengths = num_kept_tokens(self.rollouts, last_selected)
        plan = _plan(lengths, len(self.plan), self.max_tokens, self.token_multiple, self.sequence_multiple)
        return replace(self, plan=plan, num_kept_tokens=lengths)

    def replica_of(self) -> Tensor:
        """Returns `[rollouts]` int64, the replica of each rollout; -1 for dropped ones."""
        replicas = torch.full((len(self.rollouts),), -1, dtype=torch.int64)
        for replica, micro_batches in enumerate(self.plan):
            for places in micro_batches:
                replicas[places] = replica
        return replicas.to(self.device)

    @cached_property
    def teacher_reads_another(self) -> bool:
        """Whether the teacher reads a prompt of its own in any rollout."""
        return any(len(rollout.teacher_prompt_ids) for rollout in self.rollouts)

    @cached_property
    def _as_the_teacher_reads_them(self) -> tuple[list[Rollout], list[int]]:
        """The rollouts with the teacher's prompts, and how many leading tokens of each go through the teacher."""
        rollouts = [rollout.as_the_teacher_reads_it() for rollout in self.rollouts]
        added = (len(own.prompt_ids) - len(one.prompt_ids) for own, one in zip(rollouts, self.rollouts, strict=True))
        return rollouts, [kept + more for kept, more in zip(self.num_kept_tokens, added, strict=True)]

    def ranks_of(self, index: TokenIndex) -> Tensor:
        """Returns `[k]` int64, the rank that holds each of the given rows, which are rows of this batch."""
        prompts = torch.tensor([len(rollout.prompt_ids) for rollout in self.rollouts], device=self.device)
        lengths = torch.tensor([self._aligned(length) for length in self.num_kept_tokens], device=self.device)
        places = prompts[index.rollout_index] + index.position - 1
        chunks = places * 2 * self.cp_size // lengths[index.rollout_index]
        cp_ranks = owner_of_chunk(chunks, self.cp_size)
        return self.replica_of()[index.rollout_index] * self.cp_size + cp_ranks

    def _aligned(self, length: int) -> int:
        return aligned_length(length, self.sequence_multiple)

    def _num_padded(self, places: Sequence[int]) -> int:
        """Returns the number of one micro-batch's tokens, with padding."""
        tokens = sum(self._aligned(self.num_kept_tokens[place]) for place in places)
        return tokens + num_padding_tokens(tokens, self.token_multiple)

    def _rows_before_chunks(self, rollout: Rollout, num_kept: int, cp_size: int) -> list[int]:
        """Returns how many of a rollout's valid tokens come before each of its 2 cp chunks, and how many there are."""
        length = self._aligned(num_kept)
        ends = [chunk * length // (2 * cp_size) for chunk in range(2 * cp_size + 1)]
        return [_num_rows(rollout, min(end, num_kept)) for end in ends]

    def _num_rows(self, place: int) -> int:
        return _num_rows(self.rollouts[place], self.num_kept_tokens[place])


def _num_rows(rollout: Rollout, num_tokens: int) -> int:
    """Returns the number of generated labels of a rollout's first tokens: token k predicts token k + 1."""
    return rollout.num_generated_before(max(0, num_tokens + 1 - len(rollout.prompt_ids)))


def _plan(
    lengths: Sequence[int], dp_size: int, max_tokens: int, token_multiple: int, sequence_multiple: int
) -> MicroBatchPlan:
    aligned = [aligned_length(length, sequence_multiple) for length in lengths]
    return plan_micro_batches(aligned, dp_size, max_tokens, token_multiple=token_multiple)
