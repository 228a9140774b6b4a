"""A step's rollouts, laid out in micro-batches over the student's data-parallel replicas."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_tip.batching.micro_batches import (
    MicroBatchPlan,
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
    go through the model. `token_multiple`: a micro-batch is padded to a multiple of it. Micro-batches and token indices
    are built once and shared by the stages of a step.
    """

    rollouts: Sequence[Rollout]
    plan: MicroBatchPlan
    num_kept_tokens: list[int]
    max_tokens: int
    pad_token_id: int
    token_multiple: int
    device: torch.device
    _built: dict[tuple[int, int], MicroBatch] = field(default_factory=dict, init=False, repr=False, compare=False)
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
    ) -> "StepBatch":
        """Returns a batch of all tokens of `rollouts`, balanced over `dp_size` replicas; the same on every rank."""
        lengths = num_kept_tokens(rollouts, [len(rollout.response_ids) - 1 for rollout in rollouts])
        plan = plan_micro_batches(lengths, dp_size, max_tokens, token_multiple=token_multiple)
        return cls(rollouts, plan, lengths, max_tokens, pad_token_id, token_multiple, device)

    def micro_batch(self, replica: int, index: int) -> MicroBatch:
        if (replica, index) not in self._built:
            self._built[replica, index] = build_micro_batch(
                self.rollouts,
                self.plan[replica][index],
                self.pad_token_id,
                token_multiple=self.token_multiple,
                num_kept_tokens=self.num_kept_tokens,
            ).to(self.device)
        return self._built[replica, index]

    def as_the_teacher_reads_it(self, replica: int, index: int) -> list[MicroBatch]:
        """Returns the micro-batch with the teacher's prompts, cut into several where those make it too long.

        Together they have the rows of the student's micro-batch, in its order.
        """
        places = self.plan[replica][index]
        if not any(len(self.rollouts[place].teacher_prompt_ids) for place in places):
            return [self.micro_batch(replica, index)]
        rollouts, kept = self._as_the_teacher_reads_them
        capacity = self.max_tokens - self.max_tokens % self.token_multiple
        parts: list[list[int]] = [[]]
        for place in places:
            if parts[-1] and sum(kept[one] for one in parts[-1]) + kept[place] > capacity:
                parts.append([])
            parts[-1].append(place)
        built = (
            build_micro_batch(
                rollouts, part, self.pad_token_id, token_multiple=self.token_multiple, num_kept_tokens=kept
            )
            for part in parts
        )
        return [micro_batch.to(self.device) for micro_batch in built]

    def micro_batches(self, replica: int) -> list[MicroBatch]:
        return [self.micro_batch(replica, index) for index in range(len(self.plan[replica]))]

    def num_rows(self) -> list[list[int]]:
        """Returns the number of valid tokens by replica and micro-batch."""
        return [[sum(map(self._num_rows, places)) for places in replica] for replica in self.plan]

    def num_valid(self) -> int:
        """Returns the number of valid tokens of the whole batch."""
        return sum(map(sum, self.num_rows()))

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

    def token_index(self, replica: int) -> TokenIndex:
        """Returns where each row of the replica stands in the whole batch."""
        if replica not in self._indices:
            self._indices[replica] = token_index(self.micro_batches(replica))
        return self._indices[replica]

    def cut_after(self, last_selected: Sequence[int]) -> "StepBatch":
        """Returns the batch without what cannot influence the loss, redistributed over the same replicas.

        Attention is causal: tokens after a rollout's last selected position change neither loss nor gradient. They are
        cut off, rollouts with nothing selected are dropped, and the rest is balanced over the replicas again, in fewer
        micro-batches. A pure function, the same on every rank.

        Args:
            last_selected: by place in `rollouts`, the last selected position of the response; -1: none.
        """
        lengths = num_kept_tokens(self.rollouts, last_selected)
        plan = plan_micro_batches(lengths, len(self.plan), self.max_tokens, token_multiple=self.token_multiple)
        return replace(self, plan=plan, num_kept_tokens=lengths)

    def replica_of(self) -> Tensor:
        """Returns `[rollouts]` int64, the replica of each rollout; -1 for dropped ones."""
        replicas = torch.full((len(self.rollouts),), -1, dtype=torch.int64)
        for replica, micro_batches in enumerate(self.plan):
            for places in micro_batches:
                replicas[places] = replica
        return replicas.to(self.device)

    @cached_property
    def _as_the_teacher_reads_them(self) -> tuple[list[Rollout], list[int]]:
        """The rollouts with the teacher's prompts, and how many leading tokens of each go through the teacher."""
        rollouts = [rollout.as_the_teacher_reads_it() for rollout in self.rollouts]
        added = (len(own.prompt_ids) - len(one.prompt_ids) for own, one in zip(rollouts, self.rollouts, strict=True))
        return rollouts, [kept + more for kept, more in zip(self.num_kept_tokens, added, strict=True)]

    def _num_padded(self, places: Sequence[int]) -> int:
        """Returns the number of one micro-batch's tokens, with padding."""
        tokens = sum(self.num_kept_tokens[place] for place in places)
        return tokens + num_padding_tokens(tokens, self.token_multiple)

    def _num_rows(self, place: int) -> int:
        """Returns the number of generated labels: kept token k predicts token k + 1, from the last prompt token on."""
        rollout = self.rollouts[place]
        return rollout.num_generated_before(max(0, self.num_kept_tokens[place] + 1 - len(rollout.prompt_ids)))
