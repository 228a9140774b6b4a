"""The facts of synthetic pairs against plain numpy, and what the advice says and does not say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_tip.diagnostics.advice import HIGH_D, BudgetFacts, PairFacts, advice, pair_facts
from megatron_tip.diagnostics.scores import Scores
from megatron_tip.diagnostics.statistics.bootstrap import Interval
from megatron_tip.errors import InputError
from tests.helpers.diagnostics import make_bank, make_scores


@pytest.fixture
def scores(tmp_path: Path) -> Scores:
    return make_scores(make_bank(tmp_path / "bank", num_contexts=40))


def with_columns(scores: Scores, **columns: np.ndarray) -> Scores:
    return replace(scores, columns={**scores.columns, **columns})


def test_the_facts_are_those_of_numpy(scores):
    facts = pair_facts(scores, support_size=16, ratios=(0.05,), resamples=200)
    columns = {name: values.astype(np.float64) for name, values in scores.columns.items()}
    assert (facts.num_prompts, facts.num_tokens) == (40, 800)
    assert facts.start_kl.estimate == pytest.approx(columns["forward_kl"].mean())
    assert facts.reverse_kl.estimate == pytest.approx(columns["reverse_kl"].mean())
    assert facts.compatibility.estimate == pytest.approx(columns["compatibility_k16"].mean())
    order = np.argsort(columns["support_divergence_k16"])
    for ratio, found in zip(HIGH_D, facts.high_d, strict=True):
        assert found.estimate == pytest.approx(columns["compatibility_k16"][order[-int(ratio * 800) :]].mean())
        assert found.low < found.estimate < found.high
    low_entropy = columns["student_entropy"] <= np.median(columns["student_entropy"])
    far = columns["reverse_kl"] > np.median(columns["reverse_kl"])
    assert facts.q3_share.estimate == pytest.approx((low_entropy & far).mean())
    with pytest.raises(InputError, match=r"one of the scores' \[8, 16\], got 32"):
        pair_facts(scores, support_size=32, ratios=(0.05,))


def test_compatible_and_incompatible_disagreement_are_told_apart(scores):
    """C rises or falls with D."""
    divergence = scores.columns["support_divergence_k16"]
    rank = divergence.argsort().argsort() / len(divergence)
    rising, falling = (
        pair_facts(
            with_columns(scores, compatibility_k16=values.astype(np.float32)),
            support_size=16,
            ratios=(0.05,),
            resamples=20,
        )
        for values in (rank, 1 - rank)
    )
    assert rising.high_d[0].estimate > 0.9 > 0.1 > falling.high_d[0].estimate
    assert rising.learnable_share > 0.6 > 0.4 > falling.learnable_share
    assert "mostly learnable" in "\n".join(advice(rising))
    assert "mostly incompatible" in "\n".join(advice(falling))


def test_rules_that_keep_the_same_tokens_are_one_and_ties_are_told(scores):
    facts = pair_facts(scores, support_size=16, ratios=(0.03, 0.2), resamples=20)
    small, large = facts.budgets
    assert (small.num_kept, large.num_kept) == (24, 160)
    assert small.tied["ta_opd_entropy"] == 1.0, "Norm_B makes the highest twentieth equal"
    assert "ta_opd_entropy" not in large.tied
    assert sorted(name for group in large.groups for name in group) == sorted(
        name for group in small.groups for name in group
    )
    together = next(group for group in large.groups if "ta_opd_entropy" in group)
    assert "tip_entropy" in together, "both rank by the entropy"
    text = "\n".join(advice(facts))
    assert "At 3 % (24 tokens)" in text
    assert "ta_opd_entropy 100%" in text
    assert f"{len(large.groups)} different sets" in text


def facts_of(start_kl: float) -> PairFacts:
    one = Interval(0.5, 0.4, 0.6, 10)
    budget = BudgetFacts(0.05, 8, (("random",), ("tip_entropy", "ta_opd_entropy")), {})
    kl = Interval(start_kl, start_kl - 0.1, start_kl + 0.1, 10)
    return PairFacts(4, 160, 16, kl, kl, one, (one, one), 0.4, one, (budget,))


@pytest.mark.parametrize("start_kl", [0.2, 4.2])
def test_no_rule_is_recommended(start_kl):
    text = "\n".join(advice(facts_of(start_kl)))
    assert "No study of this project says which rule or budget gains most" in text
    assert f"(here {start_kl:.2f}," in text
    assert "without a verdict: 3 trainings of 5" in text
    assert "one rule of each is worth trying: random, tip_entropy." in text


def test_models_that_agree_everywhere_have_no_disagreement_to_divide(scores):
    same = with_columns(scores, support_divergence_k16=np.zeros(len(scores), dtype=np.float32))
    facts = pair_facts(same, support_size=16, ratios=(0.2,), resamples=20)
    assert "Disagreement: none" in "\n".join(advice(facts))
