"""A view shows the tokens that the step selected, at their places."""

import torch

from megatron_tip.records import Rollout, TokenSelection
from megatron_tip.training.token_views import view_content, view_of
from tests.helpers.selection import make_batch
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()


def rollout(place: int, text: str) -> Rollout:
    prompt, response = (tuple(TOKENIZER.encode(part, add_special_tokens=False)) for part in ("fox?", text))
    return Rollout(place, 0, prompt, response, (0.0,) * len(response), "stop", 0)


ROLLOUTS = [rollout(0, "the fox"), rollout(1, "dogs"), rollout(2, "the quick dog")]
LENGTHS = [len(r.response_ids) for r in ROLLOUTS]


def selection_of(mask: torch.Tensor) -> TokenSelection:
    medians = {"selection/median_student_entropy": 2.0, "selection/median_support_divergence": 1.0}
    return TokenSelection(mask, mask.float(), len(mask), int(mask.sum()), medians)


def test_view_marks_the_selected_tokens_of_the_first_responses():
    statistics, index = make_batch(1, LENGTHS)
    mask = (index.position == 1) & (index.rollout_index != 1)
    content = view_content(index, statistics, selection_of(mask), num_samples=2, num_points=1000)
    view = view_of(content, ROLLOUTS, TOKENIZER)
    assert [response.prompt for response in view.responses] == ["fox?", "fox?"]
    assert ["".join(response.tokens) for response in view.responses] == ["the fox", "dogs"]
    first, second = view.responses
    assert [place for place, chosen in enumerate(first.selected) if chosen] == [1]
    assert not any(second.selected)
    assert first.reverse_kl == tuple(statistics.reverse_kl[: LENGTHS[0]].tolist())
    assert view.medians == (2.0, 1.0)
    assert view.divergence == "support_divergence"
    expected = zip(
        statistics.student_entropy.tolist(), statistics.support_divergence.tolist(), mask.tolist(), strict=True
    )
    assert view.points == tuple(expected)


def test_points_are_thinned_over_the_whole_batch():
    statistics, index = make_batch(1, [50, 50])
    mask = torch.zeros(100, dtype=torch.bool)
    content = view_content(index, statistics, selection_of(mask), num_samples=1, num_points=30)
    assert [point[0] for point in content["points"]] == statistics.student_entropy[::4].tolist()


def test_a_rule_without_statistics_has_coloured_tokens_alone():
    _, index = make_batch(1, LENGTHS)
    selection = TokenSelection(index.position == 0, torch.ones(sum(LENGTHS)), sum(LENGTHS), 3, {})
    view = view_of(view_content(index, None, selection, num_samples=9, num_points=9), ROLLOUTS, TOKENIZER)
    assert [response.selected[0] for response in view.responses] == [True] * 3
    assert (view.points, view.medians, view.responses[0].reverse_kl) == ((), None, ())


def test_positions_that_were_not_valid_are_not_selected():
    statistics, index = make_batch(1, [len(ROLLOUTS[0].response_ids) - 1])  # the last token is masked out of the loss
    selection = selection_of(torch.ones(len(index), dtype=torch.bool))
    view = view_of(view_content(index, statistics, selection, num_samples=1, num_points=9), ROLLOUTS, TOKENIZER)
    assert view.responses[0].selected == (True,) * len(index) + (False,)
