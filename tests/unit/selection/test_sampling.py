import math

import torch

from megatron_tip.records import TokenIndex
from megatron_tip.selection import Selector
from megatron_tip.selection.sampling import inclusion_probabilities, race_scores
from megatron_tip.statistics import TokenStatistics
from tests.helpers.selection import make_batch

ENTROPY = [4.0, 2.0, 1.0, 1.0]


def entropy_batch(entropy: list[float], num_rollouts: int = 1) -> tuple[TokenStatistics, TokenIndex]:
    statistics, index = make_batch(0, [len(entropy)] * num_rollouts)
    statistics.student_entropy.copy_(torch.tensor(entropy * num_rollouts))
    return statistics, index


def test_one_draw_is_proportional_to_the_entropy():
    statistics, index = entropy_batch(ENTROPY, num_rollouts=5000)
    selector = Selector(rule="tip_entropy_sampling", retention_ratio=0.25, compare=False)
    assert selector.resolved_scope == "rollout"
    drawn = selector.select(statistics, index, step=0).selection_mask.view(5000, 4).double().mean(dim=0)
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64), rtol=0, atol=0.025)


def test_two_draws_are_successive_draws_without_replacement():
    statistics, index = entropy_batch(ENTROPY, num_rollouts=5000)
    selector = Selector(rule="tip_entropy_sampling", retention_ratio=0.5, compare=False)
    drawn = selector.select(statistics, index, step=0).selection_mask.view(5000, 4).double().mean(dim=0)
    p = [w / 8 for w in ENTROPY]
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.025)


def assert_unbiased(estimates: torch.Tensor, mean: float, unbiased: bool) -> None:
    standard_error = float(estimates.std()) / math.sqrt(len(estimates))
    deviation = abs(float(estimates.mean()) - mean) / standard_error
    assert deviation < 3.5 if unbiased else deviation > 7


def test_importance_weights_make_the_loss_of_each_rollout_unbiased():
    entropy, losses = [4.0, 2.0, 1.0, 1.0, 0.5], torch.tensor([5.0, 3.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    statistics, index = entropy_batch(entropy, num_rollouts=4000)
    for loss_scale, unbiased in (("importance", True), ("selected", False)):
        selector = Selector(rule="tip_entropy_sampling", retention_ratio=0.4, loss_scale=loss_scale, compare=False)
        weights = selector.select(statistics, index, step=0).row_weights.double().view(4000, 5)
        assert_unbiased(weights @ losses * 4000, float(losses.mean()), unbiased)


def test_importance_weights_make_the_loss_of_a_batch_unbiased():
    statistics, index = entropy_batch([0.5 + 0.1 * k for k in range(40)])
    losses = statistics.student_entropy.double() ** 2
    for loss_scale, unbiased in (("importance", True), ("selected", False)):
        selector = Selector(
            rule="tip_entropy_sampling", retention_ratio=0.25, scope="batch", loss_scale=loss_scale, compare=False
        )
        estimates = [selector.select(statistics, index, step=k).row_weights.double() @ losses for k in range(120)]
        assert_unbiased(torch.stack(estimates), float(losses.mean()), unbiased)


def test_uniform_importance_undoes_unequal_shares_of_short_rollouts():
    _, index = make_batch(1, [1, 30])
    selector = Selector(rule="random", retention_ratio=0.1, scope="rollout", loss_scale="importance")
    weights = selector.select(None, index, step=0).row_weights
    torch.testing.assert_close(weights[0], torch.tensor(1 / 31))
    torch.testing.assert_close(weights[1:][weights[1:] > 0], torch.full((3,), 10 / 31))


def test_uniform_importance_is_the_known_share():
    _, index = make_batch(2, [10, 30])
    selection = Selector(rule="random", retention_ratio=0.2, scope="batch", loss_scale="importance").select(
        None, index, step=0
    )
    torch.testing.assert_close(selection.row_weights[selection.selection_mask], torch.full((8,), 1 / 8))
    everything = Selector(rule="random", loss_scale="importance").select(None, index, step=0)
    torch.testing.assert_close(everything.row_weights, torch.full((40,), 1 / 40))


def test_rows_of_no_entropy_come_last_in_token_order():
    statistics, index = entropy_batch([0.0, 3.0, 0.0, 1e-30, 0.0])
    for step in range(20):
        selector = Selector(rule="tip_entropy_sampling", retention_ratio=0.6, loss_scale="importance", compare=False)
        selection = selector.select(statistics, index, step=step)
        assert selection.selection_mask.tolist() == [True, True, False, True, False]
        torch.testing.assert_close(selection.row_weights, torch.tensor([0.2, 0.2, 0.0, 0.2, 0.0]))


def test_race_and_inclusion_by_hand():
    uniform = torch.tensor([math.exp(-1), math.exp(-2), math.exp(-0.5)], dtype=torch.float64)
    weights = torch.tensor([2.0, 2.0, -1e-9], dtype=torch.float64)
    torch.testing.assert_close(race_scores(weights, uniform), torch.tensor([2.0, 1.0, 0.0]))
    chance = inclusion_probabilities(weights, 0.5)
    torch.testing.assert_close(chance[:2], torch.full((2,), 1 - math.exp(-4), dtype=torch.float64))
    assert inclusion_probabilities(weights, 0.0).tolist() == [1.0, 1.0, 1.0]
