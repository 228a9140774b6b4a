"""Selected rows find their way to the replica that trains on them."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.records import TokenIndex, TokenSelection
from megatron_tip.teachers.megatron import HiddenRows
from megatron_tip.training.supervision import SelectedRows
from tests.helpers.distributed import run_workers
from tests.helpers.training import make_rollouts

LENGTHS = [20, 18, 16, 14, 3, 0, 5, 9]


def hidden_of(index: TokenIndex, dtype: torch.dtype) -> torch.Tensor:
    """`[n, 3]`, told apart by rollout and position."""
    return torch.stack([index.rollout_index, index.position, index.position * 0 + 7], dim=1).to(dtype)


def move(dtype: torch.dtype) -> tuple[list[tuple[int, ...]], int]:
    """Selects every third row of the even replicas' and none of the others', cuts, moves; returns what this rank has to
    train on as (rollout, position, hidden ..., weight), read through the masks, and how many rows came from elsewhere.
    """
    rank, dp_size = dist.get_rank(), dist.get_world_size()
    layout = {"max_tokens": 24, "pad_token_id": 0, "token_multiple": 1, "device": torch.device("cpu")}
    batch = StepBatch.over(make_rollouts(LENGTHS), dp_size=dp_size, **layout)
    index = batch.token_index(rank)
    mask = (index.position % 3 == 0) & (rank % 2 == 0)
    weights = torch.where(mask, index.rollout_index + index.position / 100, 0.0)
    selection = TokenSelection(mask, weights, 85, 0, {})
    selected = SelectedRows.of(selection, index, HiddenRows(hidden_of(index, dtype)))
    last = torch.full((len(LENGTHS),), -1).scatter_reduce(
        0, selected.index.rollout_index, selected.index.position, "amax"
    )
    dist.all_reduce(last, op=dist.ReduceOp.MAX)
    cut = batch.cut_after(last.tolist())
    arrived = selected.sent_to(cut.replica_of()[selected.index.rollout_index], dist.group.WORLD)
    assert arrived.teacher_rows.states.dtype == dtype
    foreign = int((batch.replica_of()[arrived.index.rollout_index] != rank).sum())
    micro_batches = cut.micro_batches(rank)
    rows = []
    for micro_batch, part in zip(micro_batches, arrived.by_micro_batch(micro_batches), strict=True):
        rollouts, positions = micro_batch.rollout_indices[part.mask], micro_batch.position_ids[part.mask]
        prompts = torch.tensor([4 + int(place) % 3 for place in rollouts], dtype=torch.int64)
        columns = (rollouts, positions - prompts + 1, *part.teacher_rows.states.unbind(dim=1), part.row_weights)
        rows += zip(*(column.tolist() for column in columns), strict=True)
    return rows, foreign


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_rows_arrive_once_in_the_order_of_the_micro_batches(dp_size: int, tmp_path: Path):
    ranks = run_workers(move, dp_size, tmp_path, torch.bfloat16)
    rows = [row for of_rank, _ in ranks for row in of_rank]
    assert len(rows) == len(set(rows)) > 8
    for rollout, position, *hidden, weight in rows:
        assert position % 3 == 0
        assert hidden == [rollout, position, 7]
        assert weight == pytest.approx(rollout + position / 100)
    if dp_size > 1:
        assert sum(1 for of_rank, _ in ranks if of_rank) > dp_size // 2
        assert sum(foreign for _, foreign in ranks) > 0
