"""What holds for any distributions, at tp 1, 2, 3 and 4: hypothesis draws the cases, one start of workers runs them."""

import functools
import math

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import ProcessGroup

from megatron_tip.statistics import TokenStatistics
from megatron_tip.vocab_parallel import ShardedVocabulary, divergence_loss, token_statistics
from tests.helpers.distributed import run_workers
from tests.helpers.vocab_parallel import GIVEN, Case, called, on_every_layout, shard, statistics

SHARED = ("student_entropy", "teacher_entropy", "reverse_kl", "forward_kl", "jsd", "student_logprobs")
ROUNDING = 2e-5


def draw_cases(num_cases: int) -> list[Case]:
    drawn: list[Case] = []

    @settings(derandomize=True, deadline=None, max_examples=num_cases, database=None)
    @given(
        n=st.integers(1, 9),
        vocab_size=st.integers(2, 150),
        support_size=st.integers(1, 70),
        scale=st.sampled_from([0.5, 1.0, 4.0, 16.0]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def draw(**values):
        drawn.append(Case(**values))

    draw()
    return drawn


def check_bounds(case: Case, got: TokenStatistics) -> None:
    for entropy in (got.student_entropy, got.teacher_entropy):
        assert (entropy >= 0).all()
        assert (entropy <= math.log(case.vocab_size) + ROUNDING).all()
    for divergence in (got.reverse_kl, got.forward_kl, got.jsd, got.support_divergence):
        assert (divergence >= 0).all()
    assert (got.jsd <= math.log(2) + ROUNDING).all()
    for mass in (got.compatibility, got.shared_teacher_mass, got.student_mass_on_teacher_support):
        assert (mass >= 0).all()
        assert (mass <= 1 + ROUNDING).all()
    assert (got.compatibility_lower_bound <= got.compatibility + ROUNDING).all()
    assert (got.support_overlap <= min(case.support_size, case.vocab_size)).all()


def check_that_sharding_changes_nothing(case: Case, got: TokenStatistics) -> None:
    arguments = {"labels": case.labels(), "support_size": case.support_size, "vocab_size": case.vocab_size}
    whole = called(token_statistics, **case.inputs(), **arguments, with_jsd=True, with_support=True)
    for field in GIVEN:
        actual, expected = getattr(got, field.name), getattr(whole, field.name)
        if "ids" in field.name:
            assert torch.equal(actual, expected), f"{field.name} of {case}"
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=ROUNDING, msg=f"{field.name} of {case}")


def check_that_shards_may_trade_places(case: Case, got: TokenStatistics, group: ProcessGroup) -> None:
    """Shards without padding, each on the next rank: the same distributions with other ids."""
    inputs = case.inputs()
    size = inputs["student_head"].shape[0]
    heads = {
        name: shard(tensor.roll(size // group.size(), 0), group) for name, tensor in inputs.items() if "head" in name
    }
    labels = (case.labels() + size // group.size()) % size
    plain, moved = (
        statistics(case, group, vocab_size=size, **changes) for changes in ({}, {**heads, "labels": labels})
    )
    for name in SHARED:
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), rtol=1e-5, atol=ROUNDING, msg=name)


def check_that_a_shift_changes_nothing(case: Case, got: TokenStatistics, group: ProcessGroup) -> None:
    """A constant added to all logits of a row; small enough that they stay exact in bfloat16 too."""
    shifted = {}
    for name, tensor in case.inputs().items():
        column = torch.full((len(tensor), 1), 1.0 if "hidden" in name else case.scale, dtype=tensor.dtype)
        wider = torch.cat([tensor, column], 1)
        shifted[name] = shard(wider, group) if "head" in name else wider
    moved = statistics(case, group, **shifted)
    for name in SHARED:
        torch.testing.assert_close(
            getattr(moved, name), getattr(got, name), rtol=1e-5, atol=ROUNDING, msg=f"{name} of {case}"
        )


def check_the_loss(case: Case, got: TokenStatistics, group: ProcessGroup) -> None:
    """The loss is the weighted sum of the statistic; over a row's logits its gradient adds up to zero."""
    inputs = case.inputs()
    head = shard(inputs["student_head"], group).requires_grad_()
    teacher = inputs["teacher_hidden"], shard(inputs["teacher_head"], group)
    vocabulary = ShardedVocabulary(case.vocab_size, tp_group=group, chunk_rows=case.chunk_rows)
    for name in ("reverse_kl", "forward_kl", "jsd"):
        head.grad = None
        loss = divergence_loss(
            (inputs["student_hidden"], head),
            teacher,
            vocabulary,
            divergence=name,
            row_weights=case.weights(),
        )
        torch.testing.assert_close(loss.detach(), getattr(got, name) @ case.weights(), rtol=1e-4, atol=1e-4, msg=name)
        loss.backward()
        total = head.grad.double().sum(0)
        dist.all_reduce(total, group=group)
        size = max(head.grad.double().norm().item(), 1.0)
        assert total.norm() <= (1e-4 if case.dtype == torch.float32 else 5e-2) * size, f"{name} of {case}"


def check_properties(cases: list[Case], group: ProcessGroup) -> None:
    for case in cases:
        got = statistics(case, group)
        check_bounds(case, got)
        check_that_sharding_changes_nothing(case, got)
        check_that_shards_may_trade_places(case, got, group)
        check_that_a_shift_changes_nothing(case, got, group)
        check_the_loss(case, got, group)


def test_properties_hold_on_every_layout(tmp_path):
    cases = draw_cases(16)
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
    run_workers(on_every_layout, 4, tmp_path, functools.partial(check_properties, cases), timeout_seconds=120)
