"""Losses and statistics against a teacher known by its top-K, sharded, against float64 on full logits."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError
from megatron_tip.records import TeacherTopK
from megatron_tip.vocab_parallel import ShardedVocabulary, divergence_loss, padded_vocab_size
from megatron_tip.vocab_parallel.topk_divergence import topk_divergence_loss
from megatron_tip.vocab_parallel.topk_statistics import combined_statistics, known_ids, student_statistics
from tests.helpers import reference
from tests.helpers.distributed import run_workers


@dataclass(frozen=True)
class Case:
    n: int = 9
    vocab_size: int = 203
    dim: int = 16
    scale: float = 1.0
    chunk_rows: int | None = 4
    k: int = 5
    asked: bool = True
    constant: bool = False

    def tensor(self, seed: int, *shape: int) -> Tensor:
        # Multiples of 1/32 make float32 logits exact: this code is measured, not the rounding of its inputs.
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + self.n))
        return (values * 32).round() / 32

    @property
    def hidden(self) -> Tensor:
        return self.tensor(1, self.n, self.dim)

    @property
    def head(self) -> Tensor:
        spread = 0.0 if self.constant else self.scale / self.dim**0.5
        return (self.tensor(2, padded_vocab_size(self.vocab_size, 12), self.dim) * spread * 32).round() / 32

    @property
    def teacher_logits(self) -> Tensor:
        return self.tensor(3, self.n, self.vocab_size).double() * (0.0 if self.constant else 2.0)

    @property
    def labels(self) -> Tensor:
        return torch.randint(0, self.vocab_size, (self.n,), generator=torch.Generator().manual_seed(4))

    @property
    def weights(self) -> Tensor:
        return torch.rand(self.n, generator=torch.Generator().manual_seed(5))

    @property
    def student_logits(self) -> Tensor:
        return reference.full_logits(self.hidden, self.head, self.vocab_size)

    @property
    def teacher(self) -> TeacherTopK:
        log_q = self.teacher_logits.log_softmax(-1)
        ids = reference.top_ids(self.teacher_logits, self.k)
        student_ids = reference.top_ids(self.student_logits, self.k) if self.asked else None
        return TeacherTopK(
            label_logprobs=log_q.gather(1, self.labels[:, None]).squeeze(1).float(),
            support_ids=ids,
            support_logprobs=log_q.gather(1, ids).float(),
            student_support_ids=student_ids,
            student_support_logprobs=None if student_ids is None else log_q.gather(1, student_ids).float(),
        )


CASES = [
    Case(),
    Case(asked=False),
    Case(scale=12.0, chunk_rows=None),  # logits spread over more than ±50: the tail can be nothing
    Case(n=0),
    Case(n=1, vocab_size=12, k=4),  # at tp 4 shards of 3 ids: all of a shard can be known
    Case(vocab_size=25, k=12),  # padded to 36: the last ranks own one id, or none
    Case(constant=True),
    Case(vocab_size=24, k=24),  # everything is known: there is no tail
]


def topk_reference(log_p: Tensor, log_q: Tensor, ids: Tensor) -> Tensor:
    """`[n]` Σ_b p_b ln(p_b / q_b) over the ids of a row (-1: none) and all the others as one, row by row."""
    rows = []
    for p, q, row in zip(log_p, log_q, ids, strict=True):
        known = torch.tensor(sorted(set(row.tolist()) - {-1}))
        others = torch.tensor(sorted(set(range(len(p))) - set(known.tolist())), dtype=torch.int64)
        terms = (p[known].exp() * (p[known] - q[known])).sum()
        if len(others):
            tail_p, tail_q = p[others].logsumexp(0), q[others].logsumexp(0)
            terms = terms + tail_p.exp() * (tail_p - tail_q)
        rows.append(terms)
    return torch.stack(rows) if rows else log_p.sum(-1)


def shard(tensor: Tensor, group: ProcessGroup) -> Tensor:
    return tensor.chunk(group.size())[group.rank()].clone()


def loss_and_gradients(case: Case, group: ProcessGroup, divergence: str) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = case.hidden.requires_grad_(), shard(case.head, group).requires_grad_()
    ids, logprobs = known_ids(case.teacher)
    loss = topk_divergence_loss(
        (hidden, head),
        ShardedVocabulary(case.vocab_size, tp_group=group, chunk_rows=case.chunk_rows),
        divergence=divergence,
        teacher_ids=ids,
        teacher_id_logprobs=logprobs,
        labels=case.labels,
        teacher_label_logprobs=case.teacher.label_logprobs,
        row_weights=case.weights,
    )
    (2 * loss).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return loss.detach(), hidden.grad, head.grad


def check_loss(case: Case, group: ProcessGroup, divergence: str) -> None:
    loss, grad_hidden, grad_head = loss_and_gradients(case, group, divergence)
    hidden, head = case.hidden.double().requires_grad_(), case.head.double().requires_grad_()
    logits = reference.full_logits(hidden, head, case.vocab_size)
    if divergence == "sampled_token":
        values = reference.sampled_token(logits, case.teacher_logits, case.labels)
    else:
        values = topk_reference(logits.log_softmax(-1), case.teacher_logits.log_softmax(-1), known_ids(case.teacher)[0])
    expected = values @ case.weights.double()
    (2 * expected).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    pairs = [
        ("loss", loss, expected.detach()),
        ("hidden", grad_hidden, hidden.grad),
        ("head", grad_head, shard(head.grad, group)),
    ]
    for name, got, wanted in pairs:
        scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 1.0)
        torch.testing.assert_close(
            got.double(), wanted, rtol=0, atol=2e-5 * scale, msg=lambda m, n=name: f"{n} of {divergence} {case}: {m}"
        )


def check_statistics(case: Case, group: ProcessGroup) -> None:
    teacher = case.teacher
    student = student_statistics(
        (case.hidden, shard(case.head, group)),
        ShardedVocabulary(case.vocab_size, tp_group=group, chunk_rows=case.chunk_rows),
        teacher_support_ids=teacher.support_ids,
        labels=case.labels,
    )
    got = combined_statistics(student, teacher)
    expected = reference.statistics(case.student_logits, case.teacher_logits, case.labels, case.k)
    log_p, log_q = case.student_logits.log_softmax(-1), case.teacher_logits.log_softmax(-1)
    expected["topk_reverse_kl"] = topk_reference(log_p, log_q, known_ids(teacher)[0])
    for name in ("student_support_ids", "teacher_support_ids"):
        assert torch.equal(getattr(got, name), expected.pop(name)), name
    unknown = {"teacher_entropy", "reverse_kl", "forward_kl", "jsd"}
    if not case.asked:
        unknown |= {"compatibility"}
        expected["support_divergence"] = divergence_without_asking(case)
    for name, value in expected.items():
        if name in unknown:
            assert getattr(got, name) is None, name
            continue
        torch.testing.assert_close(
            getattr(got, name).double(), value, rtol=2e-5, atol=4e-6, msg=lambda m, n=name: f"{n} of {case}: {m}"
        )


def divergence_without_asking(case: Case) -> Tensor:
    """D with the teacher's mass outside its top-K taken as zero."""
    rows = []
    for p, q in zip(case.student_logits.log_softmax(-1), case.teacher_logits.log_softmax(-1), strict=True):
        theirs = reference.top_ids(q[None], case.k)[0]
        union = torch.tensor(sorted({*theirs.tolist(), *reference.top_ids(p[None], case.k)[0].tolist()}))
        log_q = q[theirs].log_softmax(0)
        rows.append((log_q.exp() * (log_q - (p[theirs] - p[union].logsumexp(0)))).sum())
    return torch.stack(rows)


def everything() -> None:
    groups = {1: None, 2: None, 4: None}
    for size in groups:
        made = [dist.new_group(list(range(first, first + size))) for first in range(0, 4, size)]
        groups[size] = made[dist.get_rank() // size]  # type: ignore[assignment]
    for case, group in itertools.product(CASES, groups.values()):
        assert group is not None
        check_statistics(case, group)
        for divergence in ("topk_reverse_kl", "sampled_token"):
            check_loss(case, group, divergence)


def test_values_and_gradients_are_those_of_float64_at_tp_1_2_and_4(tmp_path):
    run_workers(everything, 4, tmp_path, timeout_seconds=200.0)


def test_the_bucket_of_the_tail_makes_a_lower_bound_that_more_ids_raise_to_the_full_divergence():
    case = Case(n=6)
    log_p, log_q = case.student_logits.log_softmax(-1), case.teacher_logits.log_softmax(-1)
    full = reference.kl(case.student_logits, case.teacher_logits)
    before = torch.zeros(6, dtype=torch.float64)
    for k in (1, 5, 50, 203):
        ids = reference.top_ids(case.teacher_logits, k)
        losses = [
            topk_divergence_loss(
                (case.hidden[row : row + 1], case.head),
                ShardedVocabulary(203),
                teacher_ids=ids[row : row + 1],
                teacher_id_logprobs=log_q.gather(1, ids).float()[row : row + 1],
            )
            for row in range(6)
        ]
        values = torch.stack(losses).double()
        torch.testing.assert_close(values, topk_reference(log_p, log_q, ids), rtol=1e-5, atol=1e-5)
        assert (values >= before - 1e-5).all()
        assert (values <= full + 1e-5).all()
        before = values
    torch.testing.assert_close(before, full, rtol=1e-5, atol=1e-5)


def test_equal_models_have_nothing_to_learn():
    """Not even where the known ids leave most of the mass to the tail."""
    case = Case()
    hidden, head = case.hidden.requires_grad_(), case.head.requires_grad_()
    log_p = case.student_logits.log_softmax(-1)
    ids = reference.top_ids(log_p, 3)
    vocabulary, known = ShardedVocabulary(case.vocab_size), log_p.gather(1, ids).float()
    loss = topk_divergence_loss((hidden, head), vocabulary, teacher_ids=ids, teacher_id_logprobs=known)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) < 1e-6


def test_the_sampled_token_is_that_of_a_teacher_at_hand():
    case = Case()
    vocabulary = ShardedVocabulary(case.vocab_size)
    gradients = []
    for known in (True, False):
        hidden, head = case.hidden.requires_grad_(), case.head.requires_grad_()
        teacher_head = case.tensor(7, *case.head.shape)
        if known:
            log_q = reference.full_logits(case.hidden, teacher_head, case.vocab_size).log_softmax(-1)
            loss = topk_divergence_loss(
                (hidden, head),
                vocabulary,
                divergence="sampled_token",
                labels=case.labels,
                teacher_label_logprobs=log_q.gather(1, case.labels[:, None]).squeeze(1).float(),
            )
        else:
            loss = divergence_loss(
                (hidden, head),
                (case.hidden, teacher_head),
                vocabulary,
                divergence="sampled_token",
                labels=case.labels,
            )
        loss.backward()
        gradients.append((loss.detach(), hidden.grad, head.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_a_student_without_a_teacher_has_the_logprobs_of_its_labels():
    """No ids of a teacher are asked for, as by the probe of the weight sync."""
    case = Case(chunk_rows=4)
    got = student_statistics(
        (case.hidden, case.head),
        ShardedVocabulary(case.vocab_size, chunk_rows=case.chunk_rows),
        teacher_support_ids=torch.empty(case.n, 0, dtype=torch.int64),
        labels=case.labels,
    )
    expected = case.student_logits.log_softmax(-1).gather(1, case.labels[:, None]).squeeze(1)
    torch.testing.assert_close(got.label_logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    assert got.support_ids.shape == got.teacher_support_logprobs.shape == (case.n, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"divergence": "reverse_kl"}, "expected divergence in topk_reverse_kl, sampled_token, got 'reverse_kl'"),
        ({"teacher_ids": None}, r"expected teacher_ids and teacher_id_logprobs of the same shape \[9, m\]"),
        ({"teacher_ids": torch.zeros(9, 10)}, r"expected teacher_ids \[9, m\] torch.int64"),
        ({"divergence": "sampled_token", "labels": None}, "expected labels and teacher_label_logprobs"),
        ({"teacher_id_logprobs": torch.full((9, 10), torch.nan)}, "expected finite logits, got NaN or inf in rows"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    case = Case()
    ids, logprobs = known_ids(case.teacher)
    arguments = {"teacher_ids": ids, "teacher_id_logprobs": logprobs, "labels": case.labels}
    with pytest.raises(InputError, match=message):
        topk_divergence_loss((case.hidden, case.head), ShardedVocabulary(203), **(arguments | changes))


def test_a_case_is_not_empty():
    """Known ids of both models overlap in some rows only, or the cases would not tell a union from a sum."""
    ids, _ = known_ids(Case(vocab_size=25, k=12).teacher)
    assert 0 < int((ids == -1).sum()) < ids.numel()
