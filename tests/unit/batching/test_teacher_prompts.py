"""The teacher's rows are the student's, whatever prompt it reads."""

from dataclasses import replace

import torch

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.records import Rollout
from megatron_tip.teachers.served import _in_row_order
from tests.helpers.training import make_rollouts


def batch_of(rollouts: list[Rollout], dp_size: int = 2) -> StepBatch:
    device = torch.device("cpu")
    return StepBatch.over(rollouts, dp_size=dp_size, max_tokens=32, pad_token_id=0, token_multiple=1, device=device)


def test_rows_are_matched_by_response_position():
    plain = make_rollouts([5, 9, 0, 3, 7, 6])
    rollouts = [
        replace(rollout, teacher_prompt_ids=range(20, 20 + 9 * place)) if place != 3 else rollout
        for place, rollout in enumerate(plain)
    ]
    batch = batch_of(rollouts)
    for replica, micro_batches in enumerate(batch.plan):
        for index in range(len(micro_batches)):
            own, parts = batch.micro_batch(replica, index), batch.as_the_teacher_reads_it(replica, index)
            assert len(parts) == 1 or all(sum(part.lengths) <= 32 or len(part.lengths) == 1 for part in parts)
            for name in ("labels", "rollout_indices", "response_positions"):
                rows = torch.cat([getattr(part, name)[part.loss_mask] for part in parts])
                assert torch.equal(rows, getattr(own, name)[own.loss_mask]), name
    read = sum(
        sum(part.lengths)
        for replica in range(2)
        for index in range(len(batch.plan[replica]))
        for part in batch.as_the_teacher_reads_it(replica, index)
    )
    assert read == batch.num_teacher_tokens() > batch.num_model_tokens()


def test_the_teacher_reads_its_prompt_before_the_students_response():
    (rollout,) = make_rollouts([4])
    told = replace(rollout, teacher_prompt_ids=(7, 8))
    (part,) = batch_of([told], dp_size=1).as_the_teacher_reads_it(0, 0)
    assert part.input_ids.tolist() == [7, 8, *rollout.response_ids[:3]]
    assert part.labels[part.loss_mask].tolist() == list(rollout.response_ids)
    (asked,) = _in_row_order(batch_of([told], dp_size=1), 0)
    assert (asked.prompt_ids, asked.response_ids) == ((7, 8), rollout.response_ids)


def test_without_such_prompts_both_share_their_micro_batches():
    batch = batch_of(make_rollouts([4, 6]))
    assert batch.as_the_teacher_reads_it(0, 0)[0] is batch.micro_batch(0, 0)
    assert batch.num_teacher_tokens() == batch.num_model_tokens()
