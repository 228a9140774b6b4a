"""A faster import of Megatron-Core, which takes a good part of a worker's start-up time."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lean_imports() -> Iterator[None]:
    """Makes the first import of Megatron-Core cheaper within the block.

    Megatron's inference contexts import W&B if it is installed, in every worker, although at most one tracks with it;
    within the block it appears not to be installed. Without a GPU, Megatron's fused kernels are not called
    (`models/gpt.py`), but decorating them with torch.compile imports TorchInductor; the decorator therefore does
    nothing here. This package calls torch.compile only later, outside of the block.
    """
    import torch

    compile_, wandb = torch.compile, sys.modules.get("wandb")
    if wandb is None:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # makes `import wandb` an ImportError
    if not torch.cuda.is_available():
        torch.compile = _left_alone  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_
        if wandb is None:
            del sys.modules["wandb"]


def _left_alone(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Replaces torch.compile, both as a function and as a decorator with options."""
    return function if function is not None else lambda decorated: decorated
