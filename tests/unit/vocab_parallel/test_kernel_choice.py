import logging

import pytest
import torch

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import kernel_choice
from megatron_tip.vocab_parallel.kernel_choice import chosen_kernels, triton_problem
from tests.helpers.vocab_parallel import Case, called, token_statistics

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    for function in (triton_problem, kernel_choice._said_problem):
        function.cache_clear()
    yield
    for function in (triton_problem, kernel_choice._said_problem):
        function.cache_clear()


class Module:
    """Triton's kernels, of which a trial finds what `behaviour` says."""

    def __init__(self, version: str, behaviour: str = "right"):
        self.VERSION, self.behaviour = version, behaviour

    def reverse_kl_sums(self, z_s, z_t):
        if self.behaviour == "unknown GPU":
            raise RuntimeError("no PTX for sm_999")
        (sums,) = kernel_choice.kernels.reverse_kl_sums(z_s.float(), z_t.float(), [None] * 4)
        return (sums if self.behaviour == "right" else sums + 1,)


def test_auto_is_eager_on_a_cpu_and_tries_nothing(monkeypatch):
    monkeypatch.setattr(kernel_choice, "triton_kernels", lambda: pytest.fail("tried"))
    assert chosen_kernels("auto", CPU) == "eager"
    assert [chosen_kernels(name, CPU) for name in ("triton", "eager", "compiled")] == ["triton", "eager", "compiled"]


@pytest.mark.parametrize(
    "module, problem",
    [
        (Module("3.6.0"), None),
        (Module("3.1.0"), "triton 3.1.0 is older than 3.4"),
        (
            Module("3.6.0", "unknown GPU"),
            "a trial of triton 3.6.0 failed (RuntimeError: no PTX for sm_999)",
        ),
        (Module("3.6.0", "wrong"), "a trial of triton 3.6.0 gave wrong numbers"),
        (ImportError("No module named 'triton'"), "triton cannot be imported (ImportError: No module named 'triton')"),
    ],
)
def test_auto_is_triton_on_a_gpu_where_it_works_else_eager_and_says_so_once(monkeypatch, caplog, module, problem):
    def found():
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(kernel_choice, "triton_kernels", found)
    # The trial's tensors are made on the CPU: there may be no GPU here.
    monkeypatch.setattr(kernel_choice, "_trial", lambda module, _, trial=kernel_choice._trial: trial(module, CPU))
    with caplog.at_level(logging.WARNING):
        assert [chosen_kernels("auto", GPU) for _ in range(3)] == ["eager" if problem else "triton"] * 3
    assert [record.getMessage() for record in caplog.records] == (
        [f"the arithmetic on logits runs in plain torch, several times slower: {problem}"] if problem else []
    )


def test_triton_where_it_does_not_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(kernel_choice, "triton_kernels", lambda: Module("3.1.0"))
    inputs = Case(n=2).inputs()
    with pytest.raises(InputError, match=r'^token_statistics: .*got "triton": triton 3.1.0 is older than 3.4'):
        called(token_statistics, **inputs, kernels="triton")
    with pytest.raises(InputError, match="expected kernels in auto, triton, eager, compiled, got 'cuda'"):
        called(token_statistics, **inputs, kernels="cuda")
