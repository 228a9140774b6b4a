import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_tip.batching.micro_batches import build_micro_batch, num_kept_tokens, plan_micro_batches, token_index
from megatron_tip.errors import InputError
from megatron_tip.records import Rollout

PAD = 63


def rollout(
    prompt_length: int, response_length: int, seed: int = 0, spans: tuple[tuple[int, int], ...] = ()
) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, PAD, (prompt_length + response_length,), generator=generator).tolist()
    return Rollout(
        prompt_index=0,
        sample_index=0,
        prompt_ids=tuple(ids[:prompt_length]),
        response_ids=tuple(ids[prompt_length:]),
        rollout_logprobs=(-1.0,) * response_length,
        finish_reason="length",
        weight_version=0,
        environment_spans=spans,
    )


ROLLOUTS = [rollout(3, 4, 1), rollout(1, 9, 2), rollout(5, 0, 3), rollout(6, 1, 4), rollout(2, 2, 5)]
LENGTHS = [r.num_tokens for r in ROLLOUTS]
# The same lengths, of several turns.
EPISODES = [
    rollout(3, 4, 1, ((1, 3),)),
    rollout(1, 9, 2, ((2, 5), (6, 8))),
    ROLLOUTS[2],
    ROLLOUTS[3],
    ROLLOUTS[4],
]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=30),
    dp_size=st.integers(1, 5),
    max_tokens=st.integers(1, 120),
    multiple=st.sampled_from([1, 2, 3]),
)
def test_a_plan_holds_each_sequence_once_within_the_limit(lengths, dp_size, max_tokens, multiple):
    plan = plan_micro_batches(lengths, dp_size, max_tokens, token_multiple=multiple)

    def tokens_of(micro_batch):
        return sum(lengths[i] for i in micro_batch)

    assert len(plan) == dp_size
    assert all(replica for replica in plan), "every replica takes part"
    planned = [index for replica in plan for micro_batch in replica for index in micro_batch]
    assert sorted(planned) == [index for index, length in enumerate(lengths) if length]
    for replica in plan:
        assert replica == [[]] or all(replica), "an empty micro-batch stands alone"
        for micro_batch in replica:
            if len(micro_batch) > 1:
                assert -(-tokens_of(micro_batch) // multiple) * multiple <= max_tokens
    loads = [sum(map(tokens_of, replica)) for replica in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0), "longest first: never further apart than one sequence"
    for replica in plan:
        sizes = sorted(map(tokens_of, replica))
        if len(sizes) > 1:
            assert sizes[0] + sizes[1] > max_tokens - max_tokens % multiple, "no two would fit into one"


def test_a_plan_fills_each_micro_batch_with_what_still_fits():
    assert plan_micro_batches([4, 10, 1, 5, 4], 1, 10) == [[[1], [3, 0, 2], [4]]]
    assert plan_micro_batches([4, 10, 1, 5, 4], 2, 10) == [[[1], [2]], [[3, 0], [4]]]
    assert plan_micro_batches([4, 10, 1, 5, 4], 1, 11, token_multiple=4) == [[[1], [3, 2], [0, 4]]], "8 tokens at most"
    assert plan_micro_batches([9, 12, 1], 1, 3) == [[[1], [0], [2]]], "longer ones go alone"
    assert plan_micro_batches([], 2, 10) == [[[]], [[]]]


def test_impossible_plans_are_refused():
    with pytest.raises(InputError, match="max_tokens >= 1, got 1 and 0"):
        plan_micro_batches([1], 1, 0)
    with pytest.raises(InputError, match="lengths >= 0, got -1"):
        plan_micro_batches([1, -1], 1, 4)


def slow_rows(rollouts, indices, kept):
    """(rollout, place in the response, input id at the position, label), one token at a time."""
    for index in indices:
        ids = rollouts[index].prompt_ids + rollouts[index].response_ids
        for position in range(kept[index]):
            place = position + 1 - len(rollouts[index].prompt_ids)
            is_given = any(start <= place < end for start, end in rollouts[index].environment_spans)
            if place >= 0 and position + 1 < len(ids) and not is_given:
                yield index, place, ids[position], ids[position + 1]


@pytest.mark.parametrize("rollouts", [ROLLOUTS, EPISODES], ids=["one turn", "several turns"])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("kept", [None, [5, 3, 5, 6, 3], [3, 9, 1, 6, 1], [4, 6, 1, 6, 2]])
def test_masks_labels_and_index_are_those_of_a_slow_loop(rollouts, multiple, kept):
    groups = [[1, 0], [3, 2, 4]]
    micro_batches = [
        build_micro_batch(rollouts, group, PAD, token_multiple=multiple, num_kept_tokens=kept) for group in groups
    ]
    index = token_index(micro_batches)
    rows = [
        row
        for micro_batch in micro_batches
        for row in zip(
            micro_batch.input_ids[micro_batch.loss_mask].tolist(),
            micro_batch.labels[micro_batch.loss_mask].tolist(),
            strict=True,
        )
    ]
    got = list(zip(index.rollout_index.tolist(), index.position.tolist(), *zip(*rows, strict=True), strict=True))
    assert got == [row for group in groups for row in slow_rows(rollouts, group, kept or LENGTHS)]


def test_sequences_lie_end_to_end_and_padding_is_one_more_of_them():
    micro_batch = build_micro_batch(ROLLOUTS, [4, 0], PAD, token_multiple=4)
    sequences = [[*ROLLOUTS[place].prompt_ids, *ROLLOUTS[place].response_ids] for place in (4, 0)]
    assert micro_batch.lengths == (4, 7, 1)
    assert micro_batch.input_ids.tolist() == [*sequences[0], *sequences[1], PAD]
    assert micro_batch.position_ids.tolist() == [*range(4), *range(7), 0]
    assert micro_batch.rollout_indices.tolist() == [4] * 4 + [0] * 7 + [-1]
    assert micro_batch.response_positions.tolist() == [-1, 0, 1, 2, -2, -1, 0, 1, 2, 3, 4, -1]
    shifted = micro_batch.input_ids.roll(-1)
    assert torch.equal(micro_batch.labels[micro_batch.response_mask], shifted[micro_batch.response_mask])
    assert torch.equal(micro_batch.loss_mask, micro_batch.response_mask)
    assert build_micro_batch(ROLLOUTS, [4], PAD, token_multiple=4).lengths == (4,), "no padding where none is needed"


def test_a_micro_batch_without_rollouts_is_padding_and_has_no_row():
    micro_batch = build_micro_batch(ROLLOUTS, [], PAD, token_multiple=3)
    assert micro_batch.lengths == (3,)
    assert micro_batch.num_valid() == 0
    assert micro_batch.rollout_indices.tolist() == [-1] * 3
    assert len(token_index([micro_batch])) == 0


def test_an_empty_response_has_no_row():
    assert build_micro_batch(ROLLOUTS, [2], PAD).num_valid() == 0


def test_rows_have_the_logprobs_that_transformers_gives_each_sequence_alone():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config.initializer_range = 0.3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()

    def logprobs(ids, labels):
        return torch.log_softmax(model(ids).logits, -1).gather(-1, labels[..., None])[..., 0]

    def packed_logprobs(micro_batch):
        """One forward pass under the mask and with the positions that the micro-batch describes."""
        sequence = torch.arange(len(micro_batch.lengths)).repeat_interleave(torch.tensor(micro_batch.lengths))
        may_see = (sequence[:, None] == sequence[None]).tril()
        mask = torch.zeros(may_see.shape).masked_fill(~may_see, -torch.inf)[None, None]
        ids, positions = micro_batch.input_ids[None], micro_batch.position_ids[None]
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        return torch.log_softmax(logits, -1).gather(-1, micro_batch.labels[None, :, None])[0, :, 0]

    with torch.no_grad():
        alone = {}
        for i, one in enumerate(ROLLOUTS):
            ids = torch.tensor([one.prompt_ids + one.response_ids])
            values = logprobs(ids[:, :-1], ids[:, 1:])[0, len(one.prompt_ids) - 1 :]
            alone.update({(i, place): value for place, value in enumerate(values.tolist())})
        plan = plan_micro_batches(LENGTHS, 2, 16, token_multiple=4)
        seen = 0
        for group in [group for replica in plan for group in replica]:
            micro_batch = build_micro_batch(ROLLOUTS, group, PAD, token_multiple=4)
            got = packed_logprobs(micro_batch)[micro_batch.loss_mask]
            index = token_index([micro_batch])
            keys = zip(index.rollout_index.tolist(), index.position.tolist(), strict=True)
            torch.testing.assert_close(got, torch.tensor([alone[key] for key in keys]), atol=1e-5, rtol=1e-5)
            seen += len(got)
        assert seen == len(alone) == 16


def test_the_cut_keeps_every_selected_row_and_nothing_behind_the_last():
    last_selected = [2, 0, -1, 0, -1]
    kept = num_kept_tokens(ROLLOUTS, last_selected)
    assert kept == [5, 1, 0, 6, 0]
    plan = plan_micro_batches(kept, 1, 100)
    assert plan == [[[3, 0, 1]]]
    index = token_index([build_micro_batch(ROLLOUTS, plan[0][0], PAD, num_kept_tokens=kept)])
    rows = list(zip(index.rollout_index.tolist(), index.position.tolist(), strict=True))
    assert rows == [(3, 0), (0, 0), (0, 1), (0, 2), (1, 0)]
