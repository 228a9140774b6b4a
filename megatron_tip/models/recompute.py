"""Recomputation of activations in the backward pass: of whole layers or of parts of each."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch.utils.checkpoint import checkpoint


def keep_only_inputs(model: GPTModel, modules: Sequence[str]) -> None:
    """Makes every layer keep only the inputs of `modules`, which run again in the backward pass.

    Megatron's own recomputation saves and restores CUDA's random state, which a CPU does not have and which a model
    without dropout does not need.

    Args:
        modules: "layer" alone, or Megatron's names "mlp" and "core_attn".
    """
    for layer in model.decoder.layers:
        for module in _named(layer, modules):
            module.forward = partial(_again, module.forward)


def _named(layer: Any, modules: Sequence[str]) -> Iterator[torch.nn.Module]:
    found = {"layer": layer, "mlp": layer.mlp, "core_attn": layer.self_attention.core_attention}
    yield from (found[name] for name in modules)


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns what `forward` returns, and keeps only its arguments for the backward pass."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
