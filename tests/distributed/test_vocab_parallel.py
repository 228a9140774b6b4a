"""The sharded functions against the float64 formulas, at tp 1, 2, 3 and 4 in one world of four ranks."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.vocab_parallel import ShardedVocabulary, divergence_loss
from tests.helpers import reference
from tests.helpers.distributed import run_workers
from tests.helpers.vocab_parallel import GIVEN, Case, called, on_every_layout, shard, statistics

LOSSES = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("jsd", 0.5),
    ("jsd", 0.1),
    ("jsd", 0.0),
    ("jsd", 1.0),
    ("sampled_token", 0.5),
]


CASES = [
    Case(),
    Case(temperature=0.7, chunk_rows=None),
    Case(scale=8.0, temperature=0.5),  # logits spread over more than ±50
    Case(n=1, vocab_size=12, support_size=16, temperature=2.0),  # one row; K above shard and vocabulary
    Case(n=0),
    Case(vocab_size=25, support_size=20),  # padded to 36: at tp 3 and 4 the last ranks own one id, or none
    Case(constant=True),
]
BFLOAT16_CASES = [replace(case, dtype=torch.bfloat16) for case in CASES if case.temperature != 0.7]


def check_statistics(case: Case, group: ProcessGroup) -> None:
    actual = statistics(case, group)
    expected = reference.statistics(case.logits("student"), case.logits("teacher"), case.labels(), case.support_size)
    for field in GIVEN:
        value = getattr(actual, field.name)
        if "ids" in field.name:
            assert torch.equal(value, expected[field.name]), f"{field.name} of {case}"
            continue
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double(),
            expected[field.name],
            rtol=1e-5,
            atol=2e-6,
            msg=lambda m, f=field: f"{f.name} of {case}: {m}",
        )


def check_loss(case: Case, name: str, beta: float, group: ProcessGroup) -> None:
    inputs, labels, weights = case.inputs(), case.labels(), case.weights()
    hidden = inputs["student_hidden"].clone().requires_grad_()
    head = shard(inputs["student_head"], group).requires_grad_()
    loss = divergence_loss(
        (hidden, head),
        (inputs["teacher_hidden"], shard(inputs["teacher_head"], group)),
        ShardedVocabulary(case.vocab_size, case.temperature, group, case.chunk_rows, case.kernels),
        divergence=name,
        jsd_beta=beta,
        row_weights=weights,
        labels=labels,
    )
    (3 * loss).backward()
    full_hidden = inputs["student_hidden"].double().requires_grad_()
    full_head = inputs["student_head"].double().requires_grad_()
    student = case.logits("student", full_head, full_hidden)
    expected = (reference.divergence(name, student, case.logits("teacher"), labels, beta) * weights).sum()
    (3 * expected).backward()
    where = f"{name} {beta} of {case}"
    assert abs(loss.item() - expected.item()) <= 1e-5 * abs(expected.item()), f"{where}: {loss}, {expected}"
    for actual, full, wanted in (
        (hidden.grad, full_hidden.grad, full_hidden.grad),
        (head.grad, full_head.grad, shard(full_head.grad, group)),
    ):
        assert actual.dtype == case.dtype
        assert_near(actual, wanted, full, where)


def assert_near(actual: Tensor, wanted: Tensor, full: Tensor, where: str) -> None:
    """A gradient, or one rank's part of `full`, within 1e-5 of its size, or in bfloat16 its rounding."""
    tolerance = 1e-5 if actual.dtype == torch.float32 else 1e-2
    # The JSD of nearly disjoint distributions is flat: its gradient lies far below terms of size 1 that cancel in it.
    error = (actual.double() - wanted).norm().item()
    assert error <= tolerance * max(full.norm().item(), 1.0), f"{where}: gradient off by {error} of {full.norm()}"


def check_rounded_logits(group: ProcessGroup) -> None:
    """bfloat16 whose logits are rounded, as real ones are: within 2e-2 of float64 arithmetic on the same inputs."""
    case = Case(n=32, vocab_size=990, student_dim=64, teacher_dim=64, scale=2.0, chunk_rows=8)
    inputs = {name: tensor.bfloat16() for name, tensor in case.inputs().items()}
    heads = {name: shard(tensor, group) for name, tensor in inputs.items() if "head" in name}
    actual = statistics(case, group, **(inputs | heads))
    full = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    logits = [case.logits(name, full[f"{name}_head"], full[f"{name}_hidden"]) for name in ("student", "teacher")]
    expected = reference.statistics(*logits, case.labels(), case.support_size)
    for name in ("student_entropy", "teacher_entropy", "reverse_kl", "forward_kl", "jsd", "student_logprobs"):
        torch.testing.assert_close(getattr(actual, name).double(), expected[name], rtol=2e-2, atol=2e-2)
    trained = [tensor.requires_grad_() for tensor in (inputs["student_hidden"], heads["student_head"])]
    called(divergence_loss, **(inputs | heads), vocab_size=case.vocab_size, tp_group=group, chunk_rows=8).backward()
    reference.kl(*logits).sum().backward()
    for tensor, wanted in zip(
        trained, (full["student_hidden"].grad, shard(full["student_head"].grad, group)), strict=True
    ):
        assert tensor.grad.dtype == torch.bfloat16
        assert (tensor.grad.double() - wanted).norm() <= 2e-2 * wanted.norm()


def check_ties(group: ProcessGroup) -> None:
    """Equal logits in different shards, and more of them than K: the lower ids win on every layout."""
    case = Case(n=3, vocab_size=25, student_dim=1, teacher_dim=1, support_size=5)
    head = torch.tensor([0.0, 1, 0, 1, 1, 0] * 6).view(-1, 1)
    ones = torch.ones(3, 1)
    inputs = {"student_hidden": ones, "teacher_hidden": -ones}
    heads = {"student_head": shard(head, group), "teacher_head": shard(head, group)}
    actual = statistics(case, group, **inputs, **heads, labels=None)
    assert actual.student_support_ids.tolist() == [[1, 3, 4, 7, 9]] * 3
    assert actual.teacher_support_ids.tolist() == [[0, 2, 5, 6, 8]] * 3
    assert actual.support_overlap.tolist() == [0.0] * 3


def check_equal_models(group: ProcessGroup, case: Case, losses: list[tuple[str, float]]) -> None:
    """Teacher = student: every divergence and every gradient is zero to the bit."""
    inputs = case.inputs()
    hidden, head = inputs["student_hidden"], shard(inputs["student_head"], group)
    models = {"student_hidden": hidden, "teacher_hidden": hidden, "student_head": head, "teacher_head": head}
    actual = statistics(case, group, **models)
    for name in ("reverse_kl", "forward_kl", "jsd", "support_divergence"):
        assert torch.equal(getattr(actual, name), torch.zeros(case.n)), name
    assert torch.equal(actual.support_jaccard, torch.ones(case.n))
    for name, beta in losses:
        student = {"student_hidden": hidden.clone(), "student_head": head.clone()}
        for tensor in student.values():
            tensor.requires_grad_()
        arguments = {"divergence": name, "jsd_beta": beta, "labels": case.labels(), "vocab_size": case.vocab_size}
        loss = called(divergence_loss, **(models | student), **arguments, tp_group=group, kernels=case.kernels)
        loss.backward()
        assert loss.item() == 0, f"{name} {beta}"
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in student.values()), f"{name} {beta}"


def check_layout(group: ProcessGroup) -> None:
    for case in CASES + BFLOAT16_CASES:
        check_statistics(case, group)
        for name, beta in LOSSES:
            check_loss(case, name, beta, group)
    check_rounded_logits(group)
    check_ties(group)
    check_equal_models(group, Case(scale=3.0), LOSSES)


def test_every_layout_matches_the_float64_formulas(tmp_path):
    run_workers(on_every_layout, 4, tmp_path, check_layout, timeout_seconds=240)
