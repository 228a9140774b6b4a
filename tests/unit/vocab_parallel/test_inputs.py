"""What is refused, and what the message says."""

import pytest
import torch

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import ShardedVocabulary, divergence_loss, token_statistics
from tests.helpers.vocab_parallel import called

N, H, V = 3, 4, 10


def arguments(**changes):
    return {
        "student_hidden": torch.zeros(N, H),
        "student_head": torch.zeros(V, H),
        "teacher_hidden": torch.zeros(N, 6),
        "teacher_head": torch.zeros(V, 6),
    } | changes


COMMON = [
    (
        {"student_hidden": torch.zeros(N, 2, H)},
        r"student_hidden \[n, H\] and student_head .* got \[3, 2, 4\]",
    ),
    ({"teacher_head": torch.zeros(V, 5)}, r"teacher_head .* the same H, got \[3, 6\] and \[10, 5\]"),
    ({"teacher_hidden": torch.zeros(2, 6)}, "teacher_hidden with the student's 3 rows, got 2"),
    ({"teacher_head": torch.zeros(11, 6)}, "teacher_head with the student's 10 rows, got 11; pad both"),
    ({"student_hidden": torch.zeros(N, H).double()}, "one dtype of float32, bfloat16, float16, got torch.float64"),
    ({"student_hidden": torch.zeros(N, H).bfloat16()}, "got torch.bfloat16 and torch.float32; cast"),
    ({"student_head": torch.zeros(V, H, device="meta")}, "on one device, got cpu, meta"),
    ({"vocab_size": 11}, r"vocab_size of 1 to 10 \(10 rows per shard x tp size 1\), got 11"),
    ({"vocab_size": 0}, "vocab_size of 1 to 10"),
    ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels \[3\] torch.int64 on cpu, got \[2\]"),
    ({"labels": torch.zeros(N)}, r"labels \[3\] torch.int64 on cpu, got \[3\] torch.float32"),
    ({"labels": torch.tensor([0, 9, 5]), "vocab_size": 9}, r"labels in \[0, 9\), got 0 to 9; pass only rows"),
    ({"labels": torch.tensor([0, -100, 5])}, r"labels in \[0, 10\), got -100 to 5"),
    ({"student_hidden": torch.full((N, H), float("nan"))}, "finite student_hidden, got NaN or inf"),
    ({"teacher_hidden": torch.full((N, 6), float("inf"))}, "finite teacher_hidden"),
    ({"student_head": torch.full((V, H), float("nan"))}, "finite logits, got NaN or inf in rows .0, 1, 2."),
]


@pytest.mark.parametrize("function", [token_statistics, divergence_loss])
@pytest.mark.parametrize("changes, message", COMMON)
def test_arguments_that_do_not_fit_are_named(function, changes, message):
    with pytest.raises(InputError, match=f"^{function.__name__}: .*{message}"):
        called(function, **arguments(**changes))


@pytest.mark.parametrize(
    "function, changes, message",
    [
        (token_statistics, {"support_size": 0}, "support_size of at least 1, got 0"),
        (divergence_loss, {"divergence": "kl"}, "divergence in reverse_kl, forward_kl, jsd, sampled_token, got 'kl'"),
        (divergence_loss, {"jsd_beta": 1.5}, r"jsd_beta in \[0, 1\], got 1.5"),
        (divergence_loss, {"divergence": "sampled_token"}, "labels for divergence 'sampled_token', got None"),
        (divergence_loss, {"row_weights": torch.ones(2)}, r"row_weights \[3\] on cpu, got \[2\]"),
        (divergence_loss, {"row_weights": torch.tensor([1, float("nan"), 1])}, "finite row_weights"),
    ],
)
def test_settings_that_do_not_exist_are_named(function, changes, message):
    with pytest.raises(InputError, match=message):
        called(function, **arguments(**changes))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 0.0}, "temperature above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature above 0, got -1.0"),
        ({"temperature": float("nan")}, "finite temperature"),
        ({"chunk_rows": 0}, "chunk_rows of at least 1, or None, got 0"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(settings, message):
    with pytest.raises(InputError, match=f"^ShardedVocabulary: .*{message}"):
        ShardedVocabulary(**settings)


def test_an_overflow_of_the_logits_is_reported_with_its_rows():
    hidden = torch.full((N, H), 1e30)
    hidden[1] = 0
    with pytest.raises(InputError, match=r"rows \[0, 2\] .* overflow"):
        called(divergence_loss, **arguments(student_hidden=hidden, student_head=torch.full((V, H), 1e30)))
