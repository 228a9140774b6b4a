"""Which of three implementations does the arithmetic on logits: plain torch, torch.compile or Triton."""

import functools
import logging
from types import ModuleType
from typing import Literal, get_args

import torch

from megatron_tip.vocab_parallel.kernel_trial import wrong_kernels

KernelSet = Literal["eager", "compiled", "triton"]
KernelSetting = Literal["auto", "triton", "eager", "compiled"]
KERNEL_SETTINGS: tuple[str, ...] = get_args(KernelSetting)

# Triton older than this is refused by name; newer ones are tried. torch 2.8, the oldest of ours, brings 3.4.
_OLDEST_TRITON = (3, 4)

logger = logging.getLogger(__name__)


def chosen_kernels(setting: KernelSetting, device: torch.device) -> KernelSet:
    """Returns the implementation for tensors on `device`; "auto": Triton on a GPU where it works, else eager.

    Says in the log, once, which it is.
    """
    chosen = _automatic(device) if setting == "auto" else setting
    _say(chosen, device)
    return chosen


@functools.cache
def triton_problem(device: torch.device) -> str | None:
    """Returns why Triton's kernels cannot run on `device`, or None.

    The first call tries all of them. On a GPU that compiles each, unless Triton's cache on disk has it.
    """
    try:
        module = triton_kernels()
    except Exception as error:  # whatever an installation that does not fit raises
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    version = tuple(int(part) for part in module.VERSION.split(".")[:2])
    if version < _OLDEST_TRITON:
        return f"triton {module.VERSION} is older than {'.'.join(map(str, _OLDEST_TRITON))}"
    try:
        wrong = wrong_kernels(module, device)
    except Exception as error:  # a GPU it does not know, no C compiler, no driver: each raises something else
        return f"a trial of triton {module.VERSION} failed ({type(error).__name__}: {error})"
    return f"a trial of triton {module.VERSION} gave wrong numbers: {', '.join(wrong)}" if wrong else None


def triton_kernels() -> ModuleType:
    """Returns the module of Triton's kernels; raises ImportError without Triton."""
    from megatron_tip.vocab_parallel import triton_kernels

    return triton_kernels


def _automatic(device: torch.device) -> KernelSet:
    return "eager" if device.type != "cuda" or _said_problem(device) else "triton"


@functools.cache
def _said_problem(device: torch.device) -> str | None:
    problem = triton_problem(device)
    if problem:
        logger.warning("the arithmetic on logits runs in plain torch, several times slower: %s", problem)
    return problem


@functools.cache
def _say(chosen: KernelSet, device: torch.device) -> None:
    logger.info("the arithmetic on logits on %s: %s kernels", device, chosen)
