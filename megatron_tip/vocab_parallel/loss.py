"""The weighted sum of a divergence over rows, with gradients computed in the forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tip.vocab_parallel.chunks import Chunk
from megatron_tip.vocab_parallel.collectives import all_reduce_sum
from megatron_tip.vocab_parallel.inputs import HiddenAndHead, Inputs
from megatron_tip.vocab_parallel.products import add_head_gradient, hidden_gradient
from megatron_tip.vocab_parallel.row_functions import RowValues

RowFunction = Callable[[Chunk], RowValues]


def weighted_sum(
    inputs: Inputs, student: HiddenAndHead, row_weights: Tensor | None, row_function: RowFunction
) -> Tensor:
    """Returns the sum over rows of weight x value of `row_function`, differentiable with respect to `student`.

    The result is a float32 scalar, equal on all ranks. `row_weights`: `[n]`, without gradient; `None`: all 1.
    """
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in student]
    return _WeightedSum.apply(*student, inputs, row_weights, row_function, *wanted)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        inputs: Inputs,
        row_weights: Tensor | None,
        row_function: RowFunction,
        *wanted: bool,
    ) -> Tensor:
        loss, *grads = _loss_and_gradients(inputs, row_weights, row_function, *wanted)
        ctx.where = inputs.where
        ctx.grads = [
            None if grad is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, (student_hidden, student_head), strict=True)
        ]
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                f"{ctx.where}: backward ran a second time, but the first freed the gradients; compute the loss again."
            )
        # Autograd copies the tensors if we keep a reference.
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(grad_outputs[0]) for grad in grads), *[None] * 5


def _loss_and_gradients(
    inputs: Inputs, row_weights: Tensor | None, row_function: RowFunction, for_hidden: bool, for_head: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    student, partition = inputs.models[0], inputs.partition
    weights = torch.ones(inputs.num_rows, device=inputs.device) if row_weights is None else row_weights.detach().float()
    head = inputs.local_head(student)
    grad_hidden = torch.empty_like(student.hidden) if for_hidden else None
    grad_head = torch.empty_like(student.head, dtype=torch.float32) if for_head else None
    if grad_head is not None:
        grad_head[partition.num_local :] = 0
    parts = []
    for chunk in inputs.chunks():
        rows, result = chunk.rows, row_function(chunk)
        parts.append(result.values)
        if grad_hidden is None and grad_head is None:
            continue
        grad_logits = chunk.buffers[0].narrowed(result.gradient(weights[rows] / inputs.vocabulary.temperature))
        if grad_hidden is not None:
            grad_hidden[rows] = hidden_gradient(grad_logits, head)
        if grad_head is not None:
            local = grad_head[: partition.num_local]
            add_head_gradient(local, grad_logits, student.hidden[rows], first=rows.start == 0)
    values = torch.cat(parts)
    inputs.check_finite(values)
    if grad_hidden is not None:
        grad_hidden = all_reduce_sum(grad_hidden.float(), partition.group)
    return values @ weights, grad_hidden, grad_head
