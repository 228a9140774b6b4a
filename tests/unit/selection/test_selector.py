import dataclasses
import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megatron_tip.errors import ConfigError, InputError, TrainingError
from megatron_tip.records import TokenIndex, TokenSelection
from megatron_tip.selection import NORMALISERS, RULES, Input, Rule, Selector, Weight
from megatron_tip.statistics import TokenStatistics
from tests.helpers.selection import make_batch, reference_mask, reference_weights, settings_of, shard_rows, take_rows
from tools.simulated_replicas import run_simulated

LENGTHS = [17, 1, 40, 3, 0, 64, 2, 33]
WEIGHTED = sorted(rule for rule, row in RULES.items() if row.weights)
SCORED = sorted(rule for rule, row in RULES.items() if row.take in ("top", "bottom"))


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("scope", ["batch", "rollout"])
@pytest.mark.parametrize("ratio", ["0.05", "0.3"])
@pytest.mark.parametrize("rule", SCORED)
def test_selection_is_the_papers_formula(rule, ratio, scope, levels):
    statistics, index = make_batch(1, LENGTHS, levels=levels)
    selector = Selector(rule=rule, retention_ratio=float(ratio), scope=scope, compare=False)
    selection = selector.select(statistics, index, step=0)
    np.testing.assert_array_equal(
        selection.selection_mask.numpy(), reference_mask(rule, statistics, index, ratio, scope)
    )


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("step", [1, 4, 9])
@pytest.mark.parametrize("rule", WEIGHTED)
def test_weights_are_the_papers_formula(rule, step, levels):
    statistics, index = make_batch(1, LENGTHS, levels=levels, gap=3)
    selection = Selector(**settings_of(rule, 1.0)).select(statistics, index, step=step)
    main, terms = reference_weights(rule, statistics, index, progress=(step - 1) / 8)
    mask = (main > 0) | np.any([*terms.values(), main > 0], axis=0)
    np.testing.assert_array_equal(selection.selection_mask.numpy(), mask)
    assert selection.num_selected == mask.sum()
    np.testing.assert_allclose(selection.row_weights.numpy(), main / mask.sum(), rtol=1e-6)
    assert selection.term_weights.keys() == terms.keys()
    for name, weights in terms.items():
        np.testing.assert_allclose(selection.term_weights[name].numpy(), weights / mask.sum(), rtol=1e-6)
        assert 0 < weights.mean() < 1


def test_whole_rollouts_are_kept_by_their_mean_score():
    statistics, index = make_batch(1, LENGTHS)
    selection = Selector(**settings_of("fire", 0.8)).select(statistics, index, step=1)
    present = [rollout for rollout, length in enumerate(LENGTHS) if length]
    means = {rollout: float(statistics.teacher_logprobs[index.rollout_index == rollout].mean()) for rollout in present}
    kept = sorted(present, key=means.__getitem__)[len(present) - 6 :]  # 6 = ceil(0.8 x 7)
    expected = torch.isin(index.rollout_index, torch.tensor(kept))
    assert torch.equal(selection.selection_mask, expected)
    main = reference_weights("fire", statistics, index, 0.0)[0]
    expected_weights = main * expected.numpy() / expected.sum().item()
    np.testing.assert_allclose(selection.row_weights.numpy(), expected_weights, rtol=1e-6)


def negative(places, student_entropy):
    return student_entropy - 1


def test_weights_that_cannot_be_used_are_refused():
    statistics, index = make_batch(1, LENGTHS)
    bad = Rule("bad", None, take="all", weight=Weight(negative, (Input("student_entropy", NORMALISERS["raw"]),)))
    with patch.dict(RULES, bad=bad), pytest.raises(TrainingError, match=r"weights of at least 0, got \d+ others"):
        Selector("bad").select(statistics, index, step=1)
    with pytest.raises(TrainingError, match="every token of the batch weighs 0"):
        Selector("first_segment", parameters={"tokens": 0}).select(statistics, index, step=1)
    with pytest.raises(ConfigError, match=r"constants of rule 'iw_opd' \(strength\), got tokens"):
        Selector("iw_opd", parameters={"tokens": 3})
    with pytest.raises(ConfigError, match="'first_segment' needs tokens, for which no value is published"):
        Selector("first_segment")
    with pytest.raises(ConfigError, match="'eopd' keeps every row"):
        Selector("eopd", adaptive_ratio=True)
    with pytest.raises(ConfigError, match="'random', which samples"):
        Selector("random", 0.5, scope="whole_rollouts")


@pytest.mark.parametrize("rule", sorted(RULES))
def test_order_of_rows_does_not_matter(rule):
    statistics, index = make_batch(2, LENGTHS, levels=4)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(index)))
    selector = Selector(**settings_of(rule, 0.2, seed=3))
    mask = selector.select(statistics, index, step=5).selection_mask
    shuffled = selector.select(*take_rows(statistics, index, order), step=5).selection_mask
    assert torch.equal(shuffled, mask[order])


@pytest.mark.parametrize("rule", sorted(rule for rule in RULES if not RULES[rule].weights))
def test_ratio_of_one_is_plain_distillation_without_statistics(rule):
    _, index = make_batch(3, LENGTHS)
    selector = Selector(rule=rule)
    selection = selector.select(None, index, step=0)
    assert selector.required_statistics == frozenset()
    assert bool(selection.selection_mask.all())
    torch.testing.assert_close(selection.row_weights, torch.full((160,), 1 / 160))


def test_budget_is_exact_in_decimals():
    # in binary, 0.07 * 100 is 7.000000000000001, whose ceiling is 8
    _, index = make_batch(4, [100])
    assert Selector(rule="random", retention_ratio=0.07).select(None, index, step=0).num_selected == 7
    # in binary, 0.29 * 100 is 28.999999999999996, whose floor is 28
    rollout = Selector(rule="random", retention_ratio=0.29, scope="rollout").select(None, index, step=0)
    assert rollout.num_selected == 29 == int(rollout.selection_mask.sum())


def test_a_larger_ratio_keeps_what_a_smaller_one_keeps():
    statistics, index = make_batch(5, LENGTHS, levels=4)
    for rule in ("random", "tip_entropy_sampling", "ta_opd_teachability"):
        masks = [
            Selector(rule=rule, retention_ratio=ratio, scope="batch", compare=False)
            .select(statistics, index, step=1)
            .selection_mask
            for ratio in (0.01, 0.1, 0.5, 0.99)
        ]
        for small, large in itertools.pairwise(masks):
            assert bool((~small | large).all())
            assert int(small.sum()) < int(large.sum())


def test_loss_scales():
    statistics, index = make_batch(6, [100])
    for loss_scale, total in (("selected", 1.0), ("valid", 0.2)):
        selection = Selector(rule="tip_soft_or", retention_ratio=0.2, loss_scale=loss_scale).select(
            statistics, index, step=0
        )
        assert bool(((selection.row_weights > 0) == selection.selection_mask).all())
        assert float(selection.row_weights.sum()) == pytest.approx(total)


def test_random_draws_change_with_seed_and_step_and_are_uniform():
    _, index = make_batch(7, [50] * 40)

    def mask(seed: int, step: int) -> torch.Tensor:
        return Selector(rule="random", retention_ratio=0.1, seed=seed).select(None, index, step=step).selection_mask

    assert torch.equal(mask(0, 0), mask(0, 0))
    assert not torch.equal(mask(0, 0), mask(1, 0))
    assert not torch.equal(mask(0, 0), mask(0, 1))
    counts = sum(mask(0, step).long() for step in range(100)).double()
    # binomial(100, 0.1): mean 10, variance 9, over 2,000 rows
    assert float(counts.mean()) == pytest.approx(10.0)
    assert 7.8 < float(counts.var()) < 10.2


def test_nan_is_refused_by_name():
    statistics, index = make_batch(8, [10])
    statistics.compatibility[3] = float("nan")
    with pytest.raises(TrainingError, match=r"ta_opd_teachability.*compatibility"):
        Selector(rule="ta_opd_teachability", retention_ratio=0.5).select(statistics, index, step=0)
    selection = Selector(rule="ta_opd_divergence", retention_ratio=0.5).select(statistics, index, step=0)
    assert selection.num_selected == 5


def test_empty_batch_and_missing_statistics_are_refused():
    statistics, index = make_batch(9, [])
    with pytest.raises(TrainingError, match="no valid token"):
        Selector(rule="ta_opd_teachability", retention_ratio=0.5).select(statistics, index, step=0)
    _, index = make_batch(9, [4])
    with pytest.raises(InputError, match="compatibility"):
        Selector(rule="ta_opd_teachability", retention_ratio=0.5).select(None, index, step=0)


def test_index_that_does_not_fit_is_refused():
    statistics, index = make_batch(10, [4])
    with pytest.raises(InputError, match="replicas \\[0\\]"):
        Selector(rule="tip_entropy", retention_ratio=0.5).select(
            statistics, TokenIndex(index.rollout_index[:3], index.position[:3]), step=0
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rule": "tip_soft_xor", "retention_ratio": 0.5}, "tip_soft_or"),
        ({"rule": "tip_soft_or", "retention_ratio": 0.0}, "retention_ratio"),
        ({"rule": "tip_soft_or", "retention_ratio": 1.5}, "retention_ratio"),
        ({"rule": "tip_soft_or", "retention_ratio": float("nan")}, "retention_ratio"),
        ({"rule": "tip_soft_or", "scope": "token"}, "scope"),
        ({"rule": "tip_soft_or", "loss_scale": "sum"}, "loss_scale"),
        ({"rule": "tip_soft_or", "minimum_per_rollout": -1}, "minimum_per_rollout"),
        ({"rule": "no.such.module:function"}, "no.such.module"),
        ({"rule": "math:hypothenuse"}, "hypothenuse"),
        ({"rule": "math:pi"}, "float"),
        ({"rule": "tests.unit.selection.test_selector:of_unknown"}, "perplexity"),
        ({"rule": "tip_soft_or", "normaliser": "z_score"}, "normaliser"),
        ({"rule": "tip_soft_or", "tie_break": "score"}, "tie_break"),
        ({"rule": "tip_soft_or", "retention_ratio": 0.5, "loss_scale": "importance"}, "tip_entropy_sampling"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Selector(**arguments)


def of_unknown(perplexity):
    return perplexity


def jaccard_score(support_jaccard):
    return 1 - support_jaccard


def nan_score(support_jaccard):
    return support_jaccard.log() * 0


def one_number(support_jaccard):
    return support_jaccard.mean()


def three_numbers(student_entropy):
    return student_entropy[:3]


def it_fails(student_entropy):
    return student_entropy / 0 if len(student_entropy) > 3 else 1 / 0


def no_number(student_entropy, mode=None):
    return student_entropy


def mixed(student_entropy, reverse_kl, alpha=0.0):
    return alpha * student_entropy + (1 - alpha) * reverse_kl


RAW_OVERLAP = Rule("raw_overlap", lambda z: z, (Input("support_overlap", NORMALISERS["raw"]),), take="bottom")


def custom(name: str, **arguments) -> Selector:
    return Selector(rule=f"tests.unit.selection.test_selector:{name}", retention_ratio=0.5, **arguments)


def test_a_score_function_of_an_import_path():
    statistics, index = make_batch(11, [100])
    selector = custom("jaccard_score")
    assert selector.required_statistics == {"support_jaccard"}
    mask = selector.select(statistics, index, step=0).selection_mask
    assert float(statistics.support_jaccard[mask].max()) <= float(statistics.support_jaccard[~mask].min())


def test_a_rule_of_an_import_path():
    statistics, index = make_batch(11, [100])
    mask = custom("RAW_OVERLAP").select(statistics, index, step=0).selection_mask
    assert float(statistics.support_overlap[mask].max()) <= float(statistics.support_overlap[~mask].min())


def test_scores_that_cannot_be_ranked_are_refused():
    statistics, index = make_batch(11, [50])
    statistics.support_jaccard[0] = 0.0
    with pytest.raises(TrainingError, match=r"nan_score.*3 scores are NaN"):
        custom("nan_score").select(statistics, index, step=0)
    with pytest.raises(ConfigError, match=r"one_number.*shape \(3,\) for three rows, one per row, got \(\)"):
        custom("one_number").select(statistics, index, step=0)
    with pytest.raises(InputError, match=r"three_numbers.*\(50,\).*got \(3,\)"):
        custom("three_numbers").select(statistics, index, step=0)
    with pytest.raises(ConfigError, match=r"it_fails.* fails on three rows of 0.5 with ZeroDivisionError"):
        custom("it_fails").select(statistics, index, step=0)
    with pytest.raises(ConfigError, match=r"no_number.* expected a number as the default of mode, got None"):
        custom("no_number").select(statistics, index, step=0)


def test_a_parameter_with_a_default_is_a_constant():
    statistics, index = make_batch(11, [100])
    by_default = custom("mixed").select(statistics, index, step=0).selection_mask
    assert custom("mixed").required_statistics == {"student_entropy", "reverse_kl"}
    entropy = custom("mixed", parameters={"alpha": 1.0}).select(statistics, index, step=0).selection_mask
    assert (by_default != entropy).any()
    assert float(statistics.student_entropy[entropy].min()) >= float(statistics.student_entropy[~entropy].max())
    with pytest.raises(ConfigError, match=r"parameters: expected constants of rule .*mixed' \(alpha\), got beta"):
        custom("mixed", parameters={"beta": 1.0})


def test_statistics_that_a_run_does_not_compute_are_refused_before_it_starts():
    selector = Selector(rule="tip_soft_or", retention_ratio=0.5)
    top_k_server = {"student_entropy", "compatibility_lower_bound", "support_divergence"}
    with pytest.raises(ConfigError, match=r"reverse_kl.*a top-K server.*ta_opd_teachability_lower_bound") as caught:
        selector.check_available(top_k_server, "a top-K server")
    assert "tip_soft_or," not in str(caught.value)
    selector.check_available(top_k_server | {"reverse_kl"}, "a server")
    Selector(rule="tip_soft_or").check_available((), "nothing")  # keeps all rows, so needs nothing


def test_another_normaliser_and_scope_than_published():
    statistics, index = make_batch(12, [60, 40])
    selector = Selector(rule="tip_divergence", retention_ratio=0.1, normaliser="robust", scope="batch")
    order = statistics.reverse_kl.clamp(*np.quantile(statistics.reverse_kl.double().numpy(), [0.05, 0.95]).tolist())
    expected = torch.argsort(order, descending=True, stable=True)[:10]
    assert selector.select(statistics, index, step=0).selection_mask.nonzero().flatten().tolist() == sorted(
        expected.tolist()
    )
    cut = Selector(rule="ta_opd_q3_only", normaliser="raw").resolved_rule
    assert [item.normaliser.name for item in cut.inputs] == ["above_median", "above_median", "raw"]


def test_ties_by_token_order_or_at_random():
    statistics, index = make_batch(13, [100])
    statistics.support_divergence.fill_(1.0)

    def kept(step: int, **arguments) -> list[int]:
        selector = Selector(rule="ta_opd_divergence", retention_ratio=0.1, **arguments)
        selection = selector.select(statistics, index, step=step)
        assert selection.metrics["selection/tied_share"] == 1.0
        return selection.selection_mask.nonzero().flatten().tolist()

    assert kept(0) == kept(1) == list(range(10))
    random = kept(0, tie_break="random")
    assert random == kept(0, tie_break="random")
    assert len({tuple(range(10)), tuple(random), tuple(kept(1, tie_break="random"))}) == 3
    assert len(random) == 10


def test_rows_that_occur_twice_are_refused():
    statistics, index = make_batch(14, [10])
    statistics.support_divergence.fill_(1.0)
    index.position[1] = 0
    with pytest.raises(InputError, match="occurs more than once"):
        Selector(rule="ta_opd_divergence", retention_ratio=0.1, compare=False).select(statistics, index, step=0)


def test_an_index_too_large_for_the_tie_order_is_refused():
    statistics, index = make_batch(15, [2])
    index.rollout_index[1] = 2**61
    index.position[1] = 2**10
    with pytest.raises(InputError, match="62 bits"):
        Selector(rule="ta_opd_divergence", retention_ratio=0.5).select(statistics, index, step=0)


def test_rollout_budgets_of_nothing_are_refused():
    statistics, index = make_batch(16, [3, 4])
    selector = Selector(rule="tip_soft_or", retention_ratio=0.2, minimum_per_rollout=0)
    with pytest.raises(TrainingError, match="minimum_per_rollout"):
        selector.select(statistics, index, step=0)


@pytest.mark.parametrize("rule", ["random", "tip_entropy_sampling", "ta_opd_divergence", "ta_opd_teachability"])
@pytest.mark.parametrize("num_replicas", [1, 3, 32])
def test_any_number_of_replicas_selects_the_same(rule, num_replicas):
    lengths = [17, 1, 40, 3, 0, 64, 2, 33] * 4
    selector = Selector(rule=rule, retention_ratio=0.03, scope="batch", seed=9, compare=num_replicas == 3)
    whole = make_batch(17, lengths, levels=50)
    expected = selector.select(*whole, step=2)
    shards = shard_rows(whole[1], num_replicas)
    parts = run_simulated(
        lambda replica: selector.select_among(replica, *take_rows(*whole, shards[replica.rank]), step=2),
        num_replicas,
    )
    mask = torch.zeros_like(expected.selection_mask)
    for rows, part in zip(shards, parts, strict=True):
        mask[rows] = part.selection_mask
        assert part.metrics == pytest.approx(expected.metrics, rel=1e-12)
    assert torch.equal(mask, expected.selection_mask)


def test_an_optional_statistic_that_one_replica_lacks_does_not_matter():
    statistics, index = make_batch(18, [6, 6])
    with_jsd = dataclasses.replace(statistics, jsd=statistics.reverse_kl)
    selector = Selector(rule="tip_soft_or", retention_ratio=0.5)
    parts = run_simulated(
        lambda replica: selector.select_among(
            replica,
            *take_rows(
                (statistics, with_jsd)[replica.rank], index, (index.rollout_index == replica.rank).nonzero()[:, 0]
            ),
            step=0,
        ),
        2,
    )
    mask = torch.cat([part.selection_mask for part in parts])
    assert torch.equal(mask, selector.select(statistics, index, step=0).selection_mask)


def test_records():
    statistics, index = make_batch(12, [5])
    selection = Selector(rule="tip_entropy", retention_ratio=0.4).select(statistics, index, step=0)
    assert isinstance(selection, TokenSelection)
    assert isinstance(statistics, TokenStatistics)
    assert selection.row_weights.dtype == torch.float32
    assert (selection.num_valid, selection.num_selected, selection.retention_ratio) == (5, 2, 0.4)
