import math
from dataclasses import fields

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_tip.statistics import TokenStatistics
from megatron_tip.vocab_parallel import token_statistics
from tests.helpers import reference
from tests.helpers.vocab_parallel import GIVEN, called


def models(n=6, vocab_size=50, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "student_hidden": torch.randn(n, 8, generator=g),
        "student_head": torch.randn(vocab_size, 8, generator=g) * scale,
        "teacher_hidden": torch.randn(n, 12, generator=g),
        "teacher_head": torch.randn(vocab_size, 12, generator=g) * scale,
    }


def test_optional_fields_come_only_when_asked_for():
    plain = called(token_statistics, **models())
    optional = {field.name for field in fields(TokenStatistics) if getattr(plain, field.name) is None}
    assert optional == {
        "topk_reverse_kl",  # of a teacher without a distribution
        "student_logprobs",
        "teacher_logprobs",
        "jsd",
        "student_support_ids",
        "student_support_logprobs",
        "teacher_support_ids",
        "teacher_support_logprobs",
    }
    asked = called(token_statistics, **models(), labels=torch.zeros(6).long(), with_jsd=True, with_support=True)
    assert {one.name for one in fields(TokenStatistics) if getattr(asked, one.name) is None} == {"topk_reverse_kl"}
    for field in fields(TokenStatistics):
        if field.name not in optional:
            assert torch.equal(getattr(plain, field.name), getattr(asked, field.name)), field.name


def test_statistics_carry_no_gradient_and_leave_inputs_alone():
    inputs = models()
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    for tensor in inputs.values():
        tensor.requires_grad_()
    result = called(token_statistics, **inputs, with_jsd=True, with_support=True)
    assert not any(getattr(result, f.name).requires_grad for f in fields(result) if getattr(result, f.name) is not None)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@pytest.mark.parametrize("chunk_rows", [1, 4, 6, 100])
def test_the_chunk_changes_nothing(chunk_rows):
    whole, chunked = (
        called(token_statistics, **models(), chunk_rows=rows, with_jsd=True) for rows in (None, chunk_rows)
    )
    for field in fields(TokenStatistics):
        if getattr(whole, field.name) is not None:
            torch.testing.assert_close(getattr(chunked, field.name), getattr(whole, field.name), rtol=1e-6, atol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.integers(1, 90), st.integers(1, 24), st.floats(0, 30), st.floats(0.2, 5), st.integers(0, 2**31), st.booleans()
)
@example(vocab_size=37, support_size=4, scale=30.0, temperature=0.2, seed=65, same=False)  # logits far apart
def test_bounds_hold(vocab_size, support_size, scale, temperature, seed, same):
    inputs = models(4, vocab_size, scale, seed)
    if same:
        inputs |= {"teacher_hidden": inputs["student_hidden"], "teacher_head": inputs["student_head"]}
    got = called(token_statistics, **inputs, support_size=support_size, temperature=temperature, with_jsd=True)
    rounding = 1e-5
    for name in ("student_entropy", "teacher_entropy"):
        assert (getattr(got, name) >= 0).all()
        assert (getattr(got, name) <= math.log(vocab_size) + rounding).all()
    for name in ("reverse_kl", "forward_kl", "support_divergence", "jsd"):
        assert (getattr(got, name) >= 0).all()
        assert not same or (getattr(got, name) == 0).all()
    assert (got.jsd <= math.log(2) + 1e-6).all()
    masses = ("compatibility", "compatibility_lower_bound", "shared_teacher_mass", "student_mass_on_teacher_support")
    for name in masses:
        assert (getattr(got, name) >= 0).all()
        assert (getattr(got, name) <= 1 + rounding).all()
    assert (got.compatibility_lower_bound <= got.compatibility + rounding).all()
    k = min(support_size, vocab_size)
    assert (got.support_jaccard - got.support_overlap / (2 * k - got.support_overlap)).abs().max() == 0
    if k == vocab_size:  # the support is the vocabulary
        assert (got.support_overlap == k).all()
        torch.testing.assert_close(got.support_divergence, got.forward_kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.compatibility, torch.ones(4), rtol=0, atol=1e-5)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(2, 90), st.floats(-40, 40), st.integers(0, 2**31))
def test_shifting_all_logits_of_a_row_changes_nothing(vocab_size, shift, seed):
    inputs = models(4, vocab_size, 1.0, seed)
    plain = called(token_statistics, **inputs, support_size=4)
    shifted = dict(inputs)
    for model, amount in (("student", shift), ("teacher", -shift)):
        shifted[f"{model}_hidden"] = torch.cat([inputs[f"{model}_hidden"], torch.full((4, 1), amount)], 1)
        shifted[f"{model}_head"] = torch.cat([inputs[f"{model}_head"], torch.ones(vocab_size, 1)], 1)
    moved = called(token_statistics, **shifted, support_size=4)
    for name in (
        "student_entropy",
        "teacher_entropy",
        "reverse_kl",
        "forward_kl",
        "support_divergence",
        "compatibility",
    ):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), rtol=1e-3, atol=1e-4)


def test_permuting_the_vocabulary_permutes_the_ids_alone():
    inputs = models(5, 70)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    permuted = inputs | {name: inputs[name][order] for name in ("student_head", "teacher_head")}
    plain = called(token_statistics, **inputs, with_support=True)
    moved = called(token_statistics, **permuted, with_support=True)
    assert torch.equal(order[moved.student_support_ids], plain.student_support_ids)
    assert torch.equal(order[moved.teacher_support_ids], plain.teacher_support_ids)
    for name in ("student_entropy", "reverse_kl", "support_divergence", "compatibility", "support_jaccard"):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


def test_padding_rows_have_probability_zero_whatever_they_hold():
    inputs = models(5, 50)
    padded = dict(inputs)
    for model, dim in (("student", 8), ("teacher", 12)):
        padded[f"{model}_head"] = torch.cat([inputs[f"{model}_head"], torch.full((14, dim), float("nan"))])
    plain, real = called(token_statistics, **inputs), called(token_statistics, **padded, vocab_size=50)
    for field in fields(TokenStatistics):
        if getattr(plain, field.name) is not None:
            assert torch.equal(getattr(real, field.name), getattr(plain, field.name)), field.name


def test_temperature_divides_both_models():
    inputs = models(5, 50)
    hot = called(token_statistics, **inputs, temperature=2.0)
    halved = {name: tensor / 2 if "hidden" in name else tensor for name, tensor in inputs.items()}
    expected = called(token_statistics, **halved)
    for name in ("student_entropy", "teacher_entropy", "reverse_kl", "support_divergence"):
        torch.testing.assert_close(getattr(hot, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_a_wide_vocabulary_in_blocks_matches_the_formulas():
    inputs = models(9, 70_001, 2.0)
    labels = torch.arange(9) * 7777
    got = called(token_statistics, **inputs, labels=labels, chunk_rows=5, with_jsd=True, with_support=True)
    logits = [reference.full_logits(inputs[f"{m}_hidden"], inputs[f"{m}_head"]) for m in ("student", "teacher")]
    expected = reference.statistics(*logits, labels, 16)
    for field in GIVEN:
        value = getattr(got, field.name)
        torch.testing.assert_close(value.double(), expected[field.name].double(), rtol=1e-5, atol=1e-5)
