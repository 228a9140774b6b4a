"""What a simulated rank, whose tensors are the CPU's, does as on a GPU: chunks, Triton's kernels, fused layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer import mlp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tip.cpu import expert_dispatch
from megatron_tip.simulation.ledger import Ledger
from megatron_tip.simulation.tensors import tensors_in
from megatron_tip.vocab_parallel import chunks, inputs, kernels
from megatron_tip.vocab_parallel.kernel_choice import KernelSet, KernelSetting

_TILE_ROWS = 128


class FusedKernels:
    """The stand-in for the module of Triton's kernels: each call is one operation that keeps nothing for itself.

    It reads its arguments once, and a gradient also replaces the first one. The results are those of the plain kernels
    of the same names, in float32.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        plain: Callable[..., tuple[Tensor, ...]] = getattr(kernels, name)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self._ledger.paused():
                plain_results = plain(*tensors, [None] * kernels.NUM_SCRATCH)
                results = tuple(result.float() for result in plain_results)
            self._ledger.operate([*tensors, *(results or tensors[:1])])
            for tensor in tensors_in(results):
                self._ledger.hold(tensor)
            return results

        return run


class _FusedOperation(torch.autograd.Function):
    """A layer's function as one operation each way, which keeps its inputs alone for the backward pass.

    That is what torch's RMSNorm on a GPU, Transformer Engine's and Megatron's fused SwiGLU do. On a CPU, torch composes
    them of a dozen operations that keep float32 copies.
    """

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, plain: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Returns the result of `plain` for `inputs`."""
        ctx.ledger, ctx.plain = ledger, plain
        ctx.save_for_backward(*inputs)
        with ledger.paused():
            result = plain(*inputs)
        ledger.operate([*inputs, result])
        ledger.hold(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the inputs."""
        ledger: Ledger = ctx.ledger
        saved = ctx.saved_tensors  # read once: recomputed layers allow no more
        with ledger.paused(), torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in saved]
            results = torch.autograd.grad(ctx.plain(*inputs), inputs, gradients)
        ledger.operate([*gradients, *saved, *results])
        for tensor in results:
            ledger.hold(tensor)
        return None, None, *results


def fuse_activations(*models: torch.nn.Module) -> None:
    """Makes the feed-forward networks of models built on a CPU take the fused SwiGLU that those on a GPU take."""
    for model in models:
        for part in model.modules():  # experts have a configuration of their own
            if isinstance(config := getattr(part, "config", None), TransformerConfig):
                config.bias_activation_fusion = True


@contextmanager
def as_on_gpu(ledger: Ledger, memory_bytes: int) -> Iterator[None]:
    """Makes layers fused, parts of unequal sizes travel as over NCCL, and the arithmetic on logits take the chunks and
    kernels of a GPU of `memory_bytes`.

    Holds while the block lasts. SwiGLU is fused in the models that were given to `fuse_activations`.
    """

    def rows(num_rows: int, num_columns: int, device: torch.device) -> int:
        most = chunks.most_rows_on_gpu(num_columns, memory_bytes)
        return chunks.even_rows(num_rows, most, multiple_of=min(_TILE_ROWS, most))

    def chosen(setting: KernelSetting, device: torch.device) -> KernelSet:
        return "eager" if setting == "eager" else "triton"  # compiled kernels, too, take one pass and no scratch

    def norm(x: Tensor, shape: list[int], weight: Tensor, eps: float | None = None) -> Tensor:
        # torch.rms_norm: the stand-in for CUDA would send F.rms_norm back to this function.
        return _FusedOperation.apply(ledger, lambda x, weight: torch.rms_norm(x, shape, weight, eps), x, weight)

    def swiglu(x: Tensor, *_: Any) -> Tensor:
        return _FusedOperation.apply(ledger, _swiglu, x)

    def weighted_swiglu(x: Tensor, bias: None, weights: Tensor, *_: Any) -> Tensor:
        return _FusedOperation.apply(ledger, lambda x, weights: (_swiglu(x) * weights).to(x.dtype), x, weights)

    def gather(part: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
        gathered = part.new_empty(sum(sizes), *part.shape[1:])
        ledger.send("all_gather", group.group_name, [gathered])
        return gathered

    def reduce_scatter(parts: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
        ledger.send("reduce_scatter", group.group_name, [parts])
        return parts.new_empty(sizes[group.rank()], *parts.shape[1:])

    block_bytes = chunks.GPU_BLOCK_BYTES // torch.get_num_threads()
    with (
        replaced(F, "rms_norm", norm),
        replaced(expert_dispatch, "gather", gather),  # gloo's are made of an all-to-all, with copies
        replaced(expert_dispatch, "reduce_scatter", reduce_scatter),
        replaced(mlp, "bias_swiglu_impl", swiglu),
        replaced(mlp, "weighted_bias_swiglu_impl", weighted_swiglu),
        replaced(inputs, "default_chunk_rows", rows),
        replaced(inputs, "chosen_kernels", chosen),
        replaced(inputs, "triton_problem", lambda device: None),
        replaced(chunks, "triton_kernels", lambda: FusedKernels(ledger)),
        replaced(chunks, "CPU_BLOCK_BYTES_PER_THREAD", block_bytes),
    ):
        yield


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


@contextmanager
def replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """Gives an attribute of a module or a class another value while the block lasts."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
