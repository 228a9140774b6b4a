"""The sharded functions against the float64 formulas, at tp 1, 2, 3 and 4 in one world of four ranks."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError, PeerError
from megatron_tip.records import TokenStatistics
from megatron_tip.vocab_parallel import (
    divergence_loss,
    padded_vocab_size,
    token_statistics,
    vocab_parallel_entropy,
    vocab_parallel_kl,
    vocab_parallel_logprobs,
    vocab_parallel_topk,
)
from tests.helpers import reference
from tests.helpers.distributed import run_workers

LOSSES = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("jsd", 0.5),
    ("jsd", 0.1),
    ("jsd", 0.0),
    ("jsd", 1.0),
    ("sampled_token", 0.5),
]


@dataclass(frozen=True)
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
    constant: bool = False  # all logits equal

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.n + self.vocab_size)
        v = padded_vocab_size(self.vocab_size, 12)
        spread = 0.0 if self.constant else self.scale / self.student_dim**0.5
        made = {
            "student_hidden": torch.randn(self.n, self.student_dim, generator=g),
            "student_head": torch.randn(v, self.student_dim, generator=g) * spread,
            "teacher_hidden": torch.randn(self.n, self.teacher_dim, generator=g),
            "teacher_head": torch.randn(v, self.teacher_dim, generator=g) * spread,
        }
        # Multiples of 1/32 make float32 logits exact: this code is measured, not the rounding of its inputs.
        return {name: ((tensor * 32).round() / 32).to(self.dtype) for name, tensor in made.items()}

    def labels(self) -> Tensor:
        return torch.randint(0, self.vocab_size, (self.n,), generator=torch.Generator().manual_seed(1))

    def weights(self) -> Tensor:
        return torch.rand(self.n, generator=torch.Generator().manual_seed(2))

    def logits(self, name: str, head: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        inputs = self.inputs()
        hidden = inputs[f"{name}_hidden"] if hidden is None else hidden
        head = inputs[f"{name}_head"] if head is None else head
        return reference.full_logits(hidden, head, self.vocab_size, self.temperature)


CASES = [
    Case(),
    Case(temperature=0.7, chunk_rows=None),
    Case(scale=8.0, temperature=0.5),  # logits spread over more than ±50
    Case(n=1, vocab_size=12, support_size=16, temperature=2.0),  # one row; K above shard and vocabulary
    Case(n=0),
    Case(vocab_size=25, support_size=20),  # padded to 36: at tp 3 and 4 the last ranks own one id, or none
    Case(constant=True),
]


def shard(tensor: Tensor, group: ProcessGroup) -> Tensor:
    return tensor.chunk(group.size())[group.rank()].clone()


def statistics(case: Case, group: ProcessGroup, **changes) -> TokenStatistics:
    inputs = case.inputs()
    arguments = {
        **{name: shard(tensor, group) if "head" in name else tensor for name, tensor in inputs.items()},
        "labels": case.labels(),
        "support_size": case.support_size,
        "vocab_size": case.vocab_size,
        "temperature": case.temperature,
        "tp_group": group,
        "chunk_rows": case.chunk_rows,
        "with_jsd": True,
        "with_support": True,
    }
    return token_statistics(**(arguments | changes))


def check_statistics(case: Case, group: ProcessGroup) -> None:
    actual = statistics(case, group)
    expected = reference.statistics(case.logits("student"), case.logits("teacher"), case.labels(), case.support_size)
    for field in fields(TokenStatistics):
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
        hidden,
        head,
        inputs["teacher_hidden"],
        shard(inputs["teacher_head"], group),
        divergence=name,
        jsd_beta=beta,
        row_weights=weights,
        labels=labels,
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        tp_group=group,
        chunk_rows=case.chunk_rows,
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
    """A gradient, or one rank's part of `full`, within 1e-5 of its size."""
    # The JSD of nearly disjoint distributions is flat: its gradient lies far below terms of size 1 that cancel in it.
    error = (actual.double() - wanted).norm().item()
    assert error <= 1e-5 * max(full.norm().item(), 1.0), f"{where}: gradient off by {error} of {full.norm()}"


def check_logits_functions(case: Case, group: ProcessGroup) -> None:
    shape = (case.n, 1)
    inputs = case.inputs()
    padded = {name: inputs[f"{name}_hidden"] @ inputs[f"{name}_head"].T for name in ("student", "teacher")}
    shards = {
        name: logits.chunk(group.size(), 1)[group.rank()].unsqueeze(1).clone().requires_grad_()
        for name, logits in padded.items()
    }
    common = {"vocab_size": case.vocab_size, "temperature": case.temperature, "tp_group": group}
    labels = case.labels()
    values = {
        "entropy": vocab_parallel_entropy(shards["student"], **common),
        "logprobs": vocab_parallel_logprobs(shards["student"], labels.view(shape), **common),
        "kl": vocab_parallel_kl(shards["student"], shards["teacher"], **common),
    }
    full = {name: logits.double().requires_grad_() for name, logits in padded.items()}
    student, teacher = (full[name][:, : case.vocab_size] / case.temperature for name in ("student", "teacher"))
    expected = {
        "entropy": reference.entropy(student),
        "logprobs": student.log_softmax(-1).gather(1, labels[:, None]).squeeze(1),
        "kl": reference.kl(student, teacher),
    }
    for name, value in values.items():
        torch.testing.assert_close(value.double().view(-1), expected[name], rtol=1e-5, atol=1e-6)
        for model in ("student", "teacher") if name == "kl" else ("student",):
            (grad,) = torch.autograd.grad((value.view(-1) * case.weights()).sum(), shards[model], retain_graph=True)
            total = (expected[name] * case.weights()).sum()
            (full_grad,) = torch.autograd.grad(total, full[model], retain_graph=True)
            wanted = full_grad.chunk(group.size(), 1)[group.rank()].unsqueeze(1)
            assert_near(grad, wanted, full_grad, f"{name} of {case}")
    ids, logprobs = vocab_parallel_topk(shards["student"], case.support_size, **common)
    wanted_ids = reference.top_ids(student, min(case.support_size, case.vocab_size))
    assert torch.equal(ids.view(wanted_ids.shape), wanted_ids)
    wanted = student.log_softmax(-1).gather(1, wanted_ids).detach()
    torch.testing.assert_close(logprobs.double().view(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


def check_bfloat16(group: ProcessGroup) -> None:
    case = Case(n=32, vocab_size=990, student_dim=64, teacher_dim=64, scale=2.0, dtype=torch.bfloat16, chunk_rows=8)
    actual = statistics(case, group)
    expected = reference.statistics(case.logits("student"), case.logits("teacher"), case.labels(), case.support_size)
    for name in ("student_entropy", "teacher_entropy", "reverse_kl", "forward_kl", "jsd", "student_logprobs"):
        torch.testing.assert_close(getattr(actual, name).double(), expected[name], rtol=2e-2, atol=2e-2)
    inputs = case.inputs()
    hidden = inputs["student_hidden"].clone().requires_grad_()
    head = shard(inputs["student_head"], group).requires_grad_()
    teacher = inputs["teacher_hidden"], shard(inputs["teacher_head"], group)
    divergence_loss(hidden, head, *teacher, vocab_size=case.vocab_size, tp_group=group, chunk_rows=8).backward()
    exact = {name: inputs[name].double().requires_grad_() for name in ("student_hidden", "student_head")}
    student = case.logits("student", exact["student_head"], exact["student_hidden"])
    reference.kl(student, case.logits("teacher")).sum().backward()
    for actual_grad, wanted in (
        (hidden.grad, exact["student_hidden"].grad),
        (head.grad, shard(exact["student_head"].grad, group)),
    ):
        assert actual_grad.dtype == torch.bfloat16
        assert (actual_grad.double() - wanted).norm() <= 2e-2 * wanted.norm()


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


def check_equal_models(group: ProcessGroup) -> None:
    """Teacher = student: every divergence and every gradient is zero to the bit."""
    case = Case(scale=3.0)
    inputs = case.inputs()
    hidden, head = inputs["student_hidden"], shard(inputs["student_head"], group)
    models = {"student_hidden": hidden, "teacher_hidden": hidden, "student_head": head, "teacher_head": head}
    actual = statistics(case, group, **models)
    for name in ("reverse_kl", "forward_kl", "jsd", "support_divergence"):
        assert torch.equal(getattr(actual, name), torch.zeros(case.n)), name
    assert torch.equal(actual.support_jaccard, torch.ones(case.n))
    for name, beta in LOSSES:
        student = {"student_hidden": hidden.clone(), "student_head": head.clone()}
        for tensor in student.values():
            tensor.requires_grad_()
        arguments = {"divergence": name, "jsd_beta": beta, "labels": case.labels(), "vocab_size": case.vocab_size}
        loss = divergence_loss(**(models | student), **arguments, tp_group=group)
        loss.backward()
        assert loss.item() == 0, f"{name} {beta}"
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in student.values()), f"{name} {beta}"


def check_layout(group: ProcessGroup) -> None:
    for case in CASES:
        check_statistics(case, group)
        for name, beta in LOSSES:
            check_loss(case, name, beta, group)
        check_logits_functions(case, group)
    check_bfloat16(group)
    check_ties(group)
    check_equal_models(group)


def check_all_layouts() -> None:
    for layout in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2]], [[0, 1, 2, 3]]):
        group, _ = dist.new_subgroups_by_enumeration(layout)
        if any(dist.get_rank() in ranks for ranks in layout):
            check_layout(group)


def test_every_layout_matches_the_float64_formulas(tmp_path):
    run_workers(check_all_layouts, 4, tmp_path, timeout_seconds=240)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    calls = []
    for name in ("all_reduce", "all_gather"):
        original = getattr(dist, name)

        def recorded(*args, name=name, original=original, **kwargs):
            sent = args[0] if name == "all_reduce" else args[1]
            calls.append((name, sent.numel() * sent.element_size()))
            return original(*args, **kwargs)

        monkeypatch.setattr(dist, name, recorded)
    return calls


def check_collectives() -> None:
    case, group = Case(), dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        statistics(case, group, with_jsd=False)
        k = case.support_size
        chunks = [4, 4, 3]
        expected = [("all_gather", 24)]
        for c in chunks:
            expected += [("all_gather", 4 * c * (8 + 2 * 2 * k)), ("all_reduce", 4 * c * (2 * k + 2))]
        assert calls == expected
        calls.clear()
        statistics(case, group, with_jsd=True)
        assert len(calls) == 1 + 3 * len(chunks)
        assert calls[3::3] == [("all_reduce", 8 * c) for c in chunks]
        for name, floats, after in (("reverse_kl", 5, 0), ("forward_kl", 5, 0), ("jsd", 4, 2), ("sampled_token", 6, 0)):
            calls.clear()
            inputs = {key: shard(t, group) if "head" in key else t for key, t in case.inputs().items()}
            hidden = inputs.pop("student_hidden").requires_grad_()
            loss = divergence_loss(
                hidden, **inputs, divergence=name, labels=case.labels(), vocab_size=203, tp_group=group, chunk_rows=4
            )
            expected = [("all_gather", 24)]
            for c in chunks:
                expected += [("all_gather", 4 * c * floats)] + [("all_reduce", 4 * c * after)] * (after > 0)
            expected.append(("all_reduce", 4 * hidden.numel()))
            assert calls == expected, name
            loss.backward()
            assert calls == expected, "the backward pass talked"


def check_faults_on_one_rank() -> None:
    """What only one rank can see ends the call on every rank, with a message, and leaves none waiting."""
    group, rank = dist.group.WORLD, dist.get_rank()
    case = Case()
    inputs = case.inputs()

    def fault(name: str, value: float) -> dict[str, Tensor]:
        tensor = inputs[name] if "hidden" in name else shard(inputs[name], group)
        if rank == 1:
            tensor = tensor.clone()
            tensor[2, 3] = value
        return {name: tensor}

    bad_label = torch.full((case.n,), 203 if rank == 1 else 0)
    shorter = {key: inputs[key][: 10 if rank == 1 else 11] for key in ("student_hidden", "teacher_hidden")}
    for changes, wanted in (
        (fault("student_hidden", float("nan")), "student_hidden" if rank == 1 else "ranks [1]"),
        (fault("teacher_hidden", float("inf")), "teacher_hidden" if rank == 1 else "ranks [1]"),
        (fault("student_head", float("nan")), "head is not finite"),
        (fault("teacher_head", float("-inf")), "head is not finite"),
        ({"labels": bad_label}, "labels in [0, 203)" if rank == 1 else "ranks [1]"),
        ({**shorter, "labels": None}, "got [11, 10, 11]"),
    ):
        with pytest.raises((InputError, PeerError)) as caught:
            statistics(case, group, **changes)
        assert wanted in str(caught.value)
    with pytest.raises(InputError, match="head is not"):
        divergence_loss(
            inputs["student_hidden"],
            fault("student_head", float("nan"))["student_head"],
            inputs["teacher_hidden"],
            shard(inputs["teacher_head"], group),
            tp_group=group,
        )
    logits = torch.zeros(4, 5)
    logits[1, 2] = float("nan") if rank == 1 else 0.0
    with pytest.raises(InputError, match="expected finite logits"):
        vocab_parallel_entropy(logits, tp_group=group)
    # Shapes are known to all ranks: nobody waits for anybody.
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        with pytest.raises(InputError, match="vocab_size of 1 to 612"):
            statistics(replace(case, vocab_size=613), group, **{k: inputs[k] for k in ("student_head", "teacher_head")})
        assert calls == []


def check_collectives_and_faults() -> None:
    check_collectives()
    check_faults_on_one_rank()


def test_collectives_are_counted_and_faults_end_all_ranks(tmp_path):
    run_workers(check_collectives_and_faults, 3, tmp_path, timeout_seconds=120)
