"""A step's layout over rollouts with environment tokens: its rows are those of a loop over tokens."""

import pytest
import torch

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.records import Rollout


def episode(index: int, prompt_length: int, length: int, *spans: tuple[int, int]) -> Rollout:
    """Ids that say where they stand: 1000 x rollout + place in the sequence."""
    ids = tuple(1000 * (index + 1) + place for place in range(prompt_length + length))
    return Rollout(index, 0, ids[:prompt_length], ids[prompt_length:], (0.0,) * length, "stop", 0, spans)


ROLLOUTS = [episode(0, 3, 9, (2, 4), (6, 7)), episode(1, 1, 0), episode(2, 4, 5), episode(3, 2, 12, (1, 11))]
GENERATED = [
    [
        place
        for place in range(len(r.response_ids))
        if not any(start <= place < end for start, end in r.environment_spans)
    ]
    for r in ROLLOUTS
]


def batch_over(dp_size: int) -> StepBatch:
    return StepBatch.over(
        ROLLOUTS, dp_size=dp_size, max_tokens=24, pad_token_id=0, token_multiple=2, device=torch.device("cpu")
    )


def rows_of(batch: StepBatch, replica: int) -> list[tuple[int, int, int]]:
    """(rollout, position, label) of every row."""
    index = batch.token_index(replica)
    labels = torch.cat([m.labels[m.loss_mask] for m in batch.micro_batches(replica)])
    columns = (index.rollout_index, index.position, labels)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def expected_rows() -> list[tuple[int, int, int]]:
    return [(i, place, ROLLOUTS[i].response_ids[place]) for i, places in enumerate(GENERATED) for place in places]


@pytest.mark.parametrize("dp_size", [1, 2])
def test_rows_are_the_generated_tokens(dp_size: int):
    batch = batch_over(dp_size)
    rows = [rows_of(batch, replica) for replica in range(dp_size)]
    assert sorted(row for part in rows for row in part) == expected_rows()
    assert [sum(counts) for counts in batch.num_rows()] == [len(part) for part in rows]
    assert batch.num_valid() == 6 + 0 + 5 + 2


@pytest.mark.parametrize(
    "last_selected", [[8, -1, 4, 11], [5, -1, 0, 0], [4, -1, -1, 11], [0, -1, 2, -1], [7, -1, 4, 0]]
)
def test_a_cut_keeps_the_rows_up_to_the_last_selected(last_selected: list[int]):
    cut = batch_over(1).cut_after(last_selected)
    assert sorted(rows_of(cut, 0)) == [row for row in expected_rows() if row[1] <= last_selected[row[0]]]
    assert cut.num_rows() == [[micro_batch.num_valid() for micro_batch in cut.micro_batches(0)]]
