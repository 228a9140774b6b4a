"""Triton's kernels, in its interpreter, against the same float64 formulas as the eager ones; and the bytes they move.

The interpreter rounds to bfloat16 by cutting bits off, a GPU to the nearest: both are within the tolerance.
"""

import os
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tip.errors import NotFiniteError
from megatron_tip.vocab_parallel import ShardedVocabulary, divergence_loss, token_statistics
from megatron_tip.vocab_parallel.kernel_choice import triton_problem
from megatron_tip.vocab_parallel.topk_divergence import topk_divergence_loss
from megatron_tip.vocab_parallel.topk_statistics import StudentStatistics, known_ids, student_statistics
from tests.distributed import test_topk_teacher as topk_teacher
from tests.distributed.test_vocab_parallel import check_equal_models, check_loss, check_statistics
from tests.helpers.distributed import run_workers
from tests.helpers.triton_interpreter import find_triton, use_interpreter
from tests.helpers.vocab_parallel import Case, called

LOSSES = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.1), ("sampled_token", 0.5)]
SHARDED = [
    Case(n=2, scale=8.0, temperature=0.5, chunk_rows=1, kernels="triton"),  # logits spread over more than ±50
    Case(n=1, vocab_size=5, support_size=20, kernels="triton"),  # padded to 12: at tp 2 the last rank owns no id
]


def check_sharded() -> None:
    use_interpreter()
    group = dist.group.WORLD
    for case in [*SHARDED, *(replace(case, dtype=torch.bfloat16) for case in SHARDED)]:
        check_statistics(case, group)
        for name, beta in LOSSES:
            check_loss(case, name, beta, group)
    check_equal_models(group, Case(n=1, scale=3.0, kernels="triton"), LOSSES)


def check_wide(group: ProcessGroup) -> None:
    """Rows of several tiles, whose maximum grows on the way; no rows; equal logits."""
    wide = Case(n=2, vocab_size=4500, scale=4.0, kernels="triton")
    cases = [wide, replace(wide, dtype=torch.bfloat16), Case(n=0, kernels="triton")]
    for case in [*cases, Case(n=1, constant=True, kernels="triton")]:
        check_statistics(case, group)
        for name, beta in LOSSES:
            check_loss(case, name, beta, group)


def check_topk_teacher(dtype: torch.dtype) -> None:
    """A served teacher: the same as from the eager kernels, in bfloat16 to its rounding."""
    for case in (topk_teacher.Case(n=1, vocab_size=4500), topk_teacher.Case(n=2, vocab_size=24, k=24)):  # no tail
        ids, logprobs = known_ids(case.teacher)
        labels, results, statistics = case.labels, [], []
        for kernels in ("triton", "eager"):
            vocabulary = ShardedVocabulary(case.vocab_size, kernels=kernels)
            hidden, head = (tensor.to(dtype).requires_grad_() for tensor in (case.hidden, case.head))
            loss = topk_divergence_loss(
                (hidden, head), vocabulary, teacher_ids=ids, teacher_id_logprobs=logprobs, labels=labels
            )
            loss.backward()
            results.append([loss.detach(), hidden.grad, head.grad])
            support = {"teacher_support_ids": case.teacher.support_ids, "labels": labels}
            statistics.append(student_statistics((hidden, head), vocabulary, **support))
        for field in fields(StudentStatistics):
            actual, expected = (getattr(one, field.name) for one in statistics)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        for actual, expected in zip(*results, strict=True):
            assert (actual - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


def check_faults() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = {name: tensor.to(dtype) for name, tensor in Case(n=2).inputs().items()}
        for name, value in (("student_head", torch.nan), ("teacher_head", -torch.inf), ("student_head", torch.inf)):
            broken = inputs[name].clone()
            broken[100, 3] = value
            arguments = inputs | {name: broken, "kernels": "triton"}
            with pytest.raises(NotFiniteError, match="a head is not finite"):
                called(token_statistics, **arguments)
            for divergence, _ in LOSSES[:3]:
                with pytest.raises(NotFiniteError, match="a head is not finite"):
                    called(divergence_loss, **arguments, divergence=divergence)


def check_on_one_rank() -> None:
    use_interpreter()
    assert triton_problem(torch.device("cpu")) is None
    check_wide(dist.group.WORLD)
    for dtype in (torch.float32, torch.bfloat16):
        check_topk_teacher(dtype)
    check_faults()


class LogitPasses(TorchDispatchMode):
    """Counts torch's own operations on tensors of `size` values."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.seen = size, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(value, Tensor) and value.numel() == self.size for value in args):
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list of the bytes of every load and store in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    sizes: list[int] = []
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        original = getattr(InterpreterBuilder, name)

        def counted(self, *arguments, original=original, place=place, **options):
            size = arguments[0].get_element_ty().primitive_bitwidth // 8
            sizes.append(int(arguments[place].data.sum()) * size)
            return original(self, *arguments, **options)

        monkeypatch.setattr(InterpreterBuilder, name, counted)
    return sizes


ALLOWED = {"mm", "addmm_", "gather", "scatter_add_"}  # products, and what reads and writes a few ids per row
VIEWS = {"t", "transpose", "slice", "split"} | {"new_empty", "set_"}  # the last two: how the interpreter takes tensors


def check_bytes() -> None:
    use_interpreter()
    assert triton_problem(torch.device("cpu")) is None, "the trial, once in a process, is no part of a call"
    rows, width = 2, 4992  # the rows' own sums and offsets add little to this many columns
    inputs = {name: tensor.bfloat16() for name, tensor in Case(n=rows, vocab_size=width).inputs().items()}
    inputs |= {"kernels": "triton", "labels": torch.tensor([3, 4900])}
    trained = inputs | {"student_head": inputs["student_head"].requires_grad_()}
    calls = {name: (divergence_loss, trained | {"divergence": name, "jsd_beta": beta}) for name, beta in LOSSES}
    calls |= {"statistics": (token_statistics, inputs), "with_jsd": (token_statistics, inputs | {"with_jsd": True})}
    per_pair = {}
    with pytest.MonkeyPatch.context() as patch:
        sizes = moved(patch)
        for name, (function, arguments) in calls.items():
            sizes.clear()
            with LogitPasses(rows * width) as passes:
                called(function, **arguments)
            per_pair[name] = sum(sizes) / (rows * width)
            assert passes.seen["addmm_"] == 2, "the logits of both models are seen"
            assert set(passes.seen) <= ALLOWED | VIEWS, f"{name}: {passes.seen}"
    expected = {"reverse_kl": 10, "forward_kl": 10, "jsd": 14, "sampled_token": 8, "statistics": 4, "with_jsd": 8}
    assert per_pair == pytest.approx(expected, rel=0.05)
    assert max(per_pair.values()) <= 16


def check_compiles(cache: str) -> None:
    """What the interpreter cannot see: types, and what the assembler of a Hopper GPU takes."""
    os.environ["TRITON_CACHE_DIR"] = cache
    find_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from megatron_tip.vocab_parallel import triton_kernels as kernels

    def check(kernel, names: str, **constants) -> None:
        signature = {name: "*bf16" if name.startswith("z") else "*fp32" for name in names.split()}
        signature |= dict.fromkeys(constants, "constexpr")
        compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]

    for kind in ("statistics", "forward_kl"):
        check(kernels._pair_sums, "z_s z_t out groups", width=1000, kind=kind)
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        check(kernels._pair_gradient, "z_s z_t offsets mix rows", width=1000, kind=kind)
    check(kernels._jsd_sums, "z_s z_t offsets mix out", width=1000)
    check(kernels._model_sums, "z out groups", width=1000, first=0, step=1, size=3)
    check(kernels._scaled_probabilities, "z rows", width=1000)


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    run_workers(check_compiles, 1, tmp_path, str(tmp_path), timeout_seconds=200)


def test_triton_matches_the_float64_formulas_where_shards_are_many(tmp_path):
    run_workers(check_sharded, 2, tmp_path, timeout_seconds=240)


def test_triton_matches_the_float64_formulas_and_the_eager_kernels(tmp_path):
    run_workers(check_on_one_rank, 1, tmp_path, timeout_seconds=240)


def test_triton_moves_few_bytes_and_nothing_else_touches_the_logits(tmp_path):
    run_workers(check_bytes, 1, tmp_path, timeout_seconds=120)
