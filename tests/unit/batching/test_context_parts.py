"""Megatron's load-balanced cut of sequences over context-parallel ranks, and what a step's batch counts of it."""

from dataclasses import fields, replace

import pytest
import torch

from megatron_tip.batching.context_parts import context_part, token_owners
from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.records import MicroBatch
from tests.helpers.training import make_rollouts

LENGTHS = [40, 38, 1, 34, 12, 0, 10, 100]
"""Of the responses; the last sequence is longer than a micro-batch."""


def make_batch(
    *, dp_size: int = 2, cp_size: int = 2, sequence_multiple: int = 8, has_own_prompts: bool = False
) -> StepBatch:
    rollouts = make_rollouts(LENGTHS)
    if has_own_prompts:
        rollouts[1:] = [replace(one, teacher_prompt_ids=range(7 * place)) for place, one in enumerate(rollouts[1:], 1)]
    return StepBatch.over(
        rollouts,
        dp_size=dp_size,
        cp_size=cp_size,
        sequence_multiple=sequence_multiple,
        max_tokens=64,
        pad_token_id=0,
        token_multiple=6,
        device=torch.device("cpu"),
    )


def test_each_rank_holds_an_early_and_a_late_chunk():
    assert token_owners((8, 4), 2).tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0]
    assert token_owners((12,), 3).tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 0, 0]
    assert token_owners((3, 1), 1).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_the_parts_hold_every_token_once_with_its_label_and_position(cp_size: int):
    whole = make_batch().micro_batch(0, 0)
    parts = [context_part(whole, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)]
    assert {len(part.input_ids) for part in parts} == {len(whole.input_ids) // cp_size}
    assert all(part.lengths == whole.lengths for part in parts)
    order = token_owners(whole.lengths, cp_size).argsort(stable=True)
    for name in (field.name for field in fields(MicroBatch) if field.name != "lengths"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name)[order]), name


def test_padding_ends_each_sequence_and_is_never_a_row():
    batch = make_batch()
    assert batch.token_multiple == 24, "of both multiples"
    for replica in range(2):
        for index, places in enumerate(batch.plan[replica]):
            micro_batch = batch.micro_batch(replica, index)
            starts = torch.tensor([0, *micro_batch.lengths]).cumsum(0).tolist()
            for start, length, place in zip(starts, micro_batch.lengths, [*places, None], strict=False):
                kept = batch.num_kept_tokens[place] if place is not None else 0
                assert length % 8 == 0
                assert length - kept < 24
                own = slice(start, start + length)
                assert micro_batch.position_ids[own].tolist() == list(range(length))
                assert (micro_batch.rollout_indices[own] >= 0).tolist() == [True] * kept + [False] * (length - kept)
                assert not micro_batch.loss_mask[start + kept : start + length].any()
    alone = [[index] for index, places in enumerate(batch.plan[0] + batch.plan[1]) if 7 in places]
    assert len(alone) == 1
    assert [7] in batch.plan[0] + batch.plan[1], "a sequence longer than a micro-batch goes alone"


@pytest.mark.parametrize("cp_size, other", [(1, 1), (2, 1), (2, 2), (1, 4), (4, 2), (2, 4)])
@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("has_own_prompts", [False, True])
def test_counts_of_rows_are_those_of_the_parts(cp_size: int, other: int, is_cut: bool, has_own_prompts: bool):
    batch = make_batch(cp_size=cp_size, has_own_prompts=has_own_prompts)
    if is_cut:
        batch = batch.cut_after([7, 3, -1, 33, 0, -1, 2, 99])
    counts = batch.num_rows_by_part(other)
    for replica in range(2):
        ranks = range(replica * cp_size, (replica + 1) * cp_size)
        for rank in ranks:
            parts = batch.micro_batches(rank)
            assert batch.num_rows()[rank] == [part.num_valid() for part in parts]
            index = batch.token_index(rank)
            assert batch.ranks_of(index).tolist() == [rank] * len(index)
        for index in range(len(batch.plan[replica])):
            own, theirs = batch.owners_of_rows(replica, index), batch.teachers_of_rows(replica, index, other)
            found = [[int(((own == a) & (theirs == b)).sum()) for b in range(other)] for a in range(cp_size)]
            assert counts[replica][index] == found
            assert batch.num_replica_rows(replica)[index] == batch.micro_batch(replica, index).num_valid()
        assert len(batch.row_owners(replica)) == len(batch.replica_index(replica))
    assert sum(map(sum, batch.num_rows())) == batch.num_valid()
    tokens = [sum(len(part.input_ids) for part in batch.micro_batches(rank)) for rank in range(2 * cp_size)]
    assert sum(tokens) == sum(batch.num_padded_tokens())
