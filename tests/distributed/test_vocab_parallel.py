"""The sharded statistics and losses against the float64 formulas, at tp 1, 2, 3 and 4."""

from dataclasses import dataclass, fields

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.records import TokenStatistics
from megatron_tip.vocab_parallel import divergence_loss, padded_vocab_size, token_statistics
from tests.helpers import reference
from tests.helpers.distributed import run_workers

DIVERGENCES = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("jsd", 0.5),
    ("jsd", 0.1),
    ("jsd", 0.0),
    ("jsd", 1.0),
    ("sampled_token", 0.5),
]


@dataclass
class Case:
    n: int = 11
    vocab_size: int = 203
    student_dim: int = 16
    teacher_dim: int = 24
    scale: float = 1.0
    temperature: float = 1.0
    chunk_rows: int | None = 4
    support_size: int = 8
    dtype: torch.dtype = torch.float32

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.n + self.vocab_size)
        v = padded_vocab_size(self.vocab_size, 12)
        spread = self.scale / self.student_dim**0.5
        made = {
            "student_hidden": torch.randn(self.n, self.student_dim, generator=g),
            "student_head": torch.randn(v, self.student_dim, generator=g) * spread,
            "teacher_hidden": torch.randn(self.n, self.teacher_dim, generator=g),
            "teacher_head": torch.randn(v, self.teacher_dim, generator=g) * spread,
        }
        # Multiples of 1/32 make the float32 logits exact: what is measured is this code, not the rounding of its inputs.
        return {name: ((tensor * 32).round() / 32).to(self.dtype) for name, tensor in made.items()}

    def labels(self) -> Tensor:
        return torch.randint(0, self.vocab_size, (self.n,), generator=torch.Generator().manual_seed(1))

    def weights(self) -> Tensor:
        return torch.rand(self.n, generator=torch.Generator().manual_seed(2))


CASES = [
    Case(),
    Case(scale=8.0, temperature=0.5),  # logits spread over more than ±50
    Case(temperature=0.7),
    Case(n=1, vocab_size=12, support_size=16, temperature=2.0),
    Case(n=0),
    Case(vocab_size=25, support_size=20),  # at tp 4 the last shard is one real id and six of padding
    Case(dtype=torch.bfloat16),
]


def _shard(tensor: Tensor) -> Tensor:
    return tensor.chunk(dist.get_world_size())[dist.get_rank()].clone()


def _check_statistics(case: Case) -> None:
    inputs, labels = case.inputs(), case.labels()
    sharded = {name: _shard(tensor) if "head" in name else tensor for name, tensor in inputs.items()}
    actual = token_statistics(
        **sharded, labels=labels, support_size=case.support_size, vocab_size=case.vocab_size,
        temperature=case.temperature, tp_group=dist.group.WORLD, chunk_rows=case.chunk_rows, with_jsd=True, with_support=True,
    )  # fmt: skip
    logits = [
        reference.full_logits(inputs[f"{model}_hidden"], inputs[f"{model}_head"], case.vocab_size, case.temperature)
        for model in ("student", "teacher")
    ]
    expected = reference.statistics(*logits, labels, case.support_size)
    tolerance = (
        {"rtol": 1e-5, "atol": 2e-6 * max(case.scale, 1)}
        if case.dtype == torch.float32
        else {"rtol": 2e-2, "atol": 5e-2}
    )
    for field in fields(TokenStatistics):
        value = getattr(actual, field.name)
        if case.dtype == torch.bfloat16 and ("ids" in field.name or "support" in field.name):
            continue  # near-ties of bfloat16 logits change places
        if "ids" in field.name:
            assert torch.equal(value, expected[field.name]), field.name
        else:
            assert value.dtype == torch.float32
            torch.testing.assert_close(
                value.double(), expected[field.name].double(), **tolerance, msg=lambda m, f=field: f"{f.name}: {m}"
            )


def _check_loss(case: Case, name: str, beta: float) -> None:
    inputs, labels, weights = case.inputs(), case.labels(), case.weights()
    hidden = inputs["student_hidden"].clone().requires_grad_()
    head = _shard(inputs["student_head"]).requires_grad_()
    loss = divergence_loss(
        hidden, head, inputs["teacher_hidden"], _shard(inputs["teacher_head"]), divergence=name, jsd_beta=beta,
        row_weights=weights, labels=labels, vocab_size=case.vocab_size, temperature=case.temperature,
        tp_group=dist.group.WORLD, chunk_rows=case.chunk_rows,
    )  # fmt: skip
    (3 * loss).backward()
    full_hidden = inputs["student_hidden"].double().requires_grad_()
    full_head = inputs["student_head"].double().requires_grad_()
    student = reference.full_logits(full_hidden, full_head, case.vocab_size, case.temperature)
    teacher = reference.full_logits(inputs["teacher_hidden"], inputs["teacher_head"], case.vocab_size, case.temperature)
    expected = (reference.divergence(name, student, teacher, labels, beta) * weights).sum()
    (3 * expected).backward()
    bound = 1e-5 if case.dtype == torch.float32 else 2e-2
    assert abs(loss.item() - expected.item()) <= bound * abs(expected.item()), (
        f"{name} {beta} {case}: {loss}, {expected}"
    )
    for actual, full, wanted in (
        (hidden.grad, full_hidden.grad, full_hidden.grad),
        (head.grad, full_head.grad, _shard(full_head.grad)),
    ):
        assert actual.dtype == case.dtype
        # The JSD of nearly disjoint distributions is flat: its gradient is far below the terms that cancel in it, of size 1.
        error = (actual.double() - wanted).norm().item()
        assert error <= bound * max(full.norm().item(), 1.0), (
            f"{name} {beta} {case}: gradient off by {error} of {full.norm()}"
        )


def _check_all() -> None:
    for case in CASES:
        _check_statistics(case)
        for name, beta in DIVERGENCES:
            _check_loss(case, name, beta)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_statistics_and_losses_match_the_reference(tp_size, tmp_path):
    run_workers(_check_all, tp_size, tmp_path)
