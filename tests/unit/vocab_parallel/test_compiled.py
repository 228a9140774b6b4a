"""`kernels="compiled"` is the same code through torch.compile, whole kernels without a break, and the same numbers."""

import functools
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch

from megatron_tip.cpu.cuda_on_cpu import CudaOnCpu
from megatron_tip.vocab_parallel import DIVERGENCES, ShardedVocabulary, chunks, token_statistics
from megatron_tip.vocab_parallel.topk_statistics import StudentStatistics, student_statistics
from tests.helpers.vocab_parallel import GIVEN, called, pairs
from tests.unit.vocab_parallel.test_divergence import models, with_gradients


@pytest.fixture(autouse=True)
def kernels_seen(monkeypatch):
    """Traces and differentiates nothing, but leaves out the code generation, which takes a compiler and minutes."""
    compile_ = torch.compile
    seen = []

    def traced(kernel, **options):
        seen.append(kernel.__name__)
        return compile_(kernel, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(chunks, "_compile", functools.cache(chunks._compile.__wrapped__))
    return seen


@pytest.fixture(params=["plain", "with Megatron on a CPU"], autouse=True)
def stand_in(request):
    """A run without a GPU answers Megatron's CUDA calls by a mode, through which torch.compile traces the kernels."""
    with nullcontext() if request.param == "plain" else CudaOnCpu():
        yield


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_is_the_same(divergence, kernels_seen):
    inputs, arguments = models(), {"divergence": divergence, "labels": torch.arange(6), "chunk_rows": 4}
    plain = with_gradients(inputs, **arguments)
    assert not kernels_seen
    for actual, expected in zip(with_gradients(inputs, **arguments, kernels="compiled"), plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert len(kernels_seen) >= 2, "values and gradient"


def test_the_statistics_are_the_same(kernels_seen):
    inputs, arguments = models(), {"labels": torch.arange(6), "chunk_rows": 4, "with_jsd": True, "with_support": True}
    plain, compiled = (
        called(token_statistics, **inputs, **arguments, kernels=value) for value in ("eager", "compiled")
    )
    assert kernels_seen == ["statistics_sums", "jsd_sums"]
    for field in GIVEN:
        torch.testing.assert_close(getattr(compiled, field.name), getattr(plain, field.name), rtol=1e-6, atol=1e-7)


def test_the_statistics_of_a_student_alone_are_the_same(kernels_seen):
    inputs, ids = models(), torch.arange(12).view(6, 2)
    arguments = {"teacher_support_ids": ids, "labels": torch.arange(6)}
    plain, compiled = (
        student_statistics(pairs(inputs)["student"], ShardedVocabulary(chunk_rows=4, kernels=value), **arguments)
        for value in ("eager", "compiled")
    )
    assert kernels_seen == ["entropy_and_topk_sums"]
    for field in fields(StudentStatistics):
        torch.testing.assert_close(getattr(compiled, field.name), getattr(plain, field.name), rtol=1e-6, atol=1e-7)
