"""Which of three implementations does the arithmetic on logits: plain torch, torch.compile or Triton."""

import functools
import logging
from types import ModuleType
from typing import Literal, get_args

import torch

from megatron_tip.vocab_parallel import kernels

KernelSet = Literal["eager", "compiled", "triton"]
KernelSetting = Literal["auto", "triton", "eager", "compiled"]
KERNEL_SETTINGS: tuple[str, ...] = get_args(KernelSetting)

# Triton older than this is refused by name; newer ones are tried. torch 2.8, the oldest of ours, brings 3.4.
_OLDEST_TRITON = (3, 4)

logger = logging.getLogger(__name__)


def chosen_kernels(setting: KernelSetting, device: torch.device) -> KernelSet:
    """Returns the implementation for tensors on `device`; "auto": Triton on a GPU where it works, else eager."""
    if setting != "auto":
        return setting
    return "eager" if device.type != "cuda" or _said_problem(device) else "triton"


@functools.cache
def triton_problem(device: torch.device) -> str | None:
    """Returns why Triton's kernels cannot run on `device`, or None. The first call tries one: up to a few seconds."""
    try:
        module = triton_kernels()
    except Exception as error:  # whatever an installation that does not fit raises
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    version = tuple(int(part) for part in module.VERSION.split(".")[:2])
    if version < _OLDEST_TRITON:
        return f"triton {module.VERSION} is older than {'.'.join(map(str, _OLDEST_TRITON))}"
    try:
        is_right = _trial(module, device)
    except Exception as error:  # a GPU it does not know, no C compiler, no driver: each raises something else
        return f"a trial of triton {module.VERSION} failed ({type(error).__name__}: {error})"
    return None if is_right else f"a trial of triton {module.VERSION} gave wrong numbers"


def triton_kernels() -> ModuleType:
    """Returns the module of Triton's kernels; raises ImportError without Triton."""
    from megatron_tip.vocab_parallel import triton_kernels

    return triton_kernels


@functools.cache
def _said_problem(device: torch.device) -> str | None:
    problem = triton_problem(device)
    if problem:
        logger.warning("the arithmetic on logits runs in plain torch, several times slower: %s", problem)
    return problem


def _trial(module: ModuleType, device: torch.device) -> bool:
    """Returns whether sums over two rows of made-up logits are those of the eager kernels."""
    logits = [torch.linspace(-1, end, 2 * 70, device=device).view(2, 70).bfloat16() for end in (2.0, 3.0)]
    student, teacher = (z.float() for z in logits)
    (expected,) = kernels.reverse_kl_sums(student, teacher, [None] * kernels.NUM_SCRATCH)
    (actual,) = module.reverse_kl_sums(*logits)
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
