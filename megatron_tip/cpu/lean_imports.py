"""Megatron-Core without what it imports for nobody here: a good part of a worker's start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lean_imports() -> Iterator[None]:
    """In this block Megatron-Core may be imported for the first time, and costs less.

    Its inference contexts import W&B wherever that is installed, in every worker, of which one at most tracks with it;
    they are told that it is not. Without a GPU its fused kernels are not called (`models/gpt.py`), but decorating them
    with torch.compile imports TorchInductor; they are left as they are. What this package compiles itself, it compiles
    when it is called, and not in this block.
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
    """Stands for torch.compile, as a function and as a decorator with options."""
    return function if function is not None else lambda decorated: decorated
