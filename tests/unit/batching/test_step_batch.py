"""A step's layout before and after the cut after the selected tokens."""

import pytest
import torch

from megatron_tip.batching.micro_batches import token_index
from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.errors import InputError
from megatron_tip.training.step_metrics import saved_metrics
from tests.helpers.training import make_rollouts

LENGTHS = [40, 38, 36, 34, 12, 0, 10, 8]


def make_batch(dp_size: int, **arguments) -> StepBatch:
    settings = {"max_tokens": 64, "pad_token_id": 0, "token_multiple": 4, "device": torch.device("cpu")}
    return StepBatch.over(make_rollouts(LENGTHS), dp_size=dp_size, **(settings | arguments))


def test_what_is_left_is_balanced_over_the_replicas_again():
    batch = make_batch(2)
    first = [place for places in batch.plan[0] for place in places]
    last_selected = [39 if place in first else 0 for place in range(len(LENGTHS))]  # replica 1 keeps next to nothing
    last_selected[5] = -1
    cut = batch.cut_after([min(last, length - 1) for last, length in zip(last_selected, LENGTHS, strict=True)])
    loads = cut.num_padded_tokens()
    assert max(loads) - min(loads) <= max(cut.num_kept_tokens) + 4
    assert cut.replica_of().tolist() != batch.replica_of().tolist()
    assert cut.replica_of()[5] == -1
    assert cut.num_micro_batches() < batch.num_micro_batches()
    assert cut.num_model_tokens() < batch.num_model_tokens()


@pytest.mark.parametrize("multiple", [1, 4])
def test_token_counts_are_those_of_the_micro_batches(multiple):
    batch = make_batch(3, token_multiple=multiple).cut_after([7, 3, -1, 33, 0, -1, 2, 1])
    micro_batches = [batch.micro_batches(replica) for replica in range(3)]
    padded = [sum(micro_batch.input_ids.numel() for micro_batch in own) for own in micro_batches]
    assert batch.num_padded_tokens() == padded
    assert batch.num_micro_batches() == sum(map(len, micro_batches))
    is_padding = torch.cat([micro_batch.rollout_indices < 0 for own in micro_batches for micro_batch in own])
    share = saved_metrics(batch, batch, 1.0)["train/padding_token_share"]
    assert share == pytest.approx(float(is_padding.double().mean()))
    assert (share > 0) == (multiple > 1)
    places = [places for own in micro_batches for m in own for places in m.rollout_indices.tolist() if places >= 0]
    assert batch.num_model_tokens() == len(places)
    for place, length in enumerate(batch.num_kept_tokens):
        assert places.count(place) == length
    assert batch.num_valid() == sum(micro_batch.num_valid() for own in micro_batches for micro_batch in own)


def test_a_replica_without_rollouts_has_padding_alone():
    batch = make_batch(2).cut_after([3, *[-1] * 7])
    assert batch.num_padded_tokens() == [8, 4]
    assert batch.micro_batch(1, 0).lengths == (4,)


def test_a_loss_mask_beyond_the_response_is_refused():
    (micro_batch, *_) = make_batch(1, max_tokens=128).micro_batches(0)
    start = micro_batch.lengths[0]  # of the second sequence
    micro_batch.loss_mask[start + 1] = True
    place = int(micro_batch.rollout_indices[start])
    with pytest.raises(InputError, match=f"loss_mask: .* got 1 others, the first at position 1 of rollout {place}"):
        token_index([micro_batch])


def test_the_stages_of_a_step_share_what_is_built_and_a_cut_builds_anew():
    batch = make_batch(2)
    assert batch.micro_batches(1)[0] is batch.micro_batch(1, 0)
    assert batch.token_index(0) is batch.token_index(0)
    cut = batch.cut_after([3] * 5 + [-1] + [3] * 2)
    assert len(cut.token_index(0)) < len(batch.token_index(0))
    assert len(batch.token_index(0)) + len(batch.token_index(1)) == batch.num_valid()
