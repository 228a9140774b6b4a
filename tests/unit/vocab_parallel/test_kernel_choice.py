import logging

import pytest
import torch

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import kernel_choice, kernels
from megatron_tip.vocab_parallel.kernel_choice import chosen_kernels, triton_problem
from megatron_tip.vocab_parallel.kernel_trial import wrong_kernels
from tests.helpers.vocab_parallel import Case, called, token_statistics

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    for function in (triton_problem, kernel_choice._said_problem, kernel_choice._say):
        function.cache_clear()
    yield
    for function in (triton_problem, kernel_choice._said_problem, kernel_choice._say):
        function.cache_clear()


class Module:
    """Stands for Triton's kernels: the eager ones, but for what `behaviour` says of the kernel `odd` in `dtype`."""

    TILE = 128

    def __init__(self, version: str, behaviour: str = "right", odd: str = "reverse_kl_sums", dtype=torch.bfloat16):
        self.VERSION, self.behaviour, self.odd, self.dtype = version, behaviour, odd, dtype
        self.called = set()

    def __getattr__(self, name):
        def run(*tensors):
            self.called.add(name)
            is_odd = (name, tensors[0].dtype) == (self.odd, self.dtype)
            if is_odd and self.behaviour == "unknown GPU":
                raise RuntimeError("no PTX for sm_999")
            scratch, copies = [None] * 4, [tensor.float() + 0 for tensor in tensors]
            if name.endswith("_gradient"):  # Triton's gradients begin with the logits themselves
                mix = copies[2:4] if name == "jsd_gradient" else []
                getattr(kernels, name.replace("gradient", "sums"))(*copies[:2], *mix, scratch)
            results = getattr(kernels, name)(*copies, scratch)
            if not results:
                tensors[0].copy_(copies[0])
            if is_odd and self.behaviour == "wrong":
                *_, last = results or tensors[:1]
                last[-1, -1] += 0.05 * last.abs().max() + 1e-6
            return results

        return run


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
        (Module("3.6.0", "wrong"), "a trial of triton 3.6.0 gave wrong numbers: reverse_kl_sums of bfloat16"),
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
    monkeypatch.setattr(kernel_choice, "wrong_kernels", lambda module, _: wrong_kernels(module, CPU))
    with caplog.at_level(logging.WARNING):
        assert [chosen_kernels("auto", GPU) for _ in range(3)] == ["eager" if problem else "triton"] * 3
    assert [record.getMessage() for record in caplog.records] == (
        [f"the arithmetic on logits runs in plain torch, several times slower: {problem}"] if problem else []
    )


KERNELS = [name for name, value in vars(kernels).items() if name.endswith(("_sums", "_gradient", "_probabilities"))]


def test_the_trial_runs_every_kernel():
    module = Module("3.6.0")
    assert wrong_kernels(module, CPU) == []
    assert module.called == set(KERNELS)
    assert len(KERNELS) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_the_trial_finds_one_wrong_number_of_any_kernel(name, dtype):
    assert wrong_kernels(Module("3.6.0", "wrong", name, dtype), CPU) == [f"{name} of {str(dtype)[6:]}"]


def test_the_log_says_once_which_kernels_were_chosen(caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            chosen_kernels("auto", CPU)
            chosen_kernels("compiled", CPU)
    assert [record.getMessage() for record in caplog.records] == [
        f"the arithmetic on logits on cpu: {name} kernels" for name in ("eager", "compiled")
    ]


def test_triton_where_it_does_not_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(kernel_choice, "triton_kernels", lambda: Module("3.1.0"))
    inputs = Case(n=2).inputs()
    with pytest.raises(InputError, match=r'^token_statistics: .*got "triton": triton 3.1.0 is older than 3.4'):
        called(token_statistics, **inputs, kernels="triton")
    with pytest.raises(InputError, match="expected kernels in auto, triton, eager, compiled, got 'cuda'"):
        called(token_statistics, **inputs, kernels="cuda")
