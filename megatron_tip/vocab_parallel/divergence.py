"""Divergences between student p and teacher q as losses, with their gradients made in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import row_functions
from megatron_tip.vocab_parallel.chunks import LogitBuffer, RowBlocks, row_ranges
from megatron_tip.vocab_parallel.collectives import all_reduce_sum
from megatron_tip.vocab_parallel.inputs import Inputs, checked_inputs
from megatron_tip.vocab_parallel.products import add_head_gradient, hidden_gradient
from megatron_tip.vocab_parallel.row_functions import RowValues

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "sampled_token")


def divergence_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    divergence: str = "reverse_kl",
    row_weights: Tensor | None = None,
    labels: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    tp_group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """The sum over rows of weight x divergence: a float32 scalar, equal on all ranks of `tp_group`.

    Pass only the rows that are supervised; no other row costs anything then. Gradient: flows to `student_hidden` and
    `student_head` where they require it. That of the hidden states is the *complete* one on every rank of `tp_group`
    (already summed over the shards; do not reduce it again), that of the head is this shard's own.

    Args:
        student_hidden, teacher_hidden: `[n, H]`, the same on all ranks of `tp_group`.
        student_head, teacher_head: `[V_padded / tp, H]`, this rank's rows of the output layer.
        divergence: "reverse_kl" KL(p || q) (TIP Eq. 1, TA-OPD Eq. 6); "forward_kl" KL(q || p); "jsd" the generalised
            Jensen-Shannon divergence beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, with
            forward KL at beta 0 and reverse KL at beta 1; "sampled_token" log p(y) - log q(y) of the label y
            (TA-OPD after Eq. 6), with the gradient (log p(y) - log q(y)) d log p(y): over y drawn from p at this
            temperature its mean is the gradient of the reverse KL; that of plain differentiation, d log p(y), is zero.
        row_weights: `[n]` float32 without gradient; `None`: all 1.
        labels: `[n]` int64 in [0, vocab_size), for "sampled_token".
        vocab_size: number of real ids; `None`: no padding.
        temperature: divides the logits of both models.
        jsd_beta: in [0, 1].
        tp_group: over which both heads are sharded in equal parts; `None`: not sharded.
        chunk_rows: rows whose logits exist at a time; `None`: chosen from the shapes.

    Memory: two float32 logit chunks, the head's gradient in float32, and `[n, H]`; nothing of `[n, V]` outlives its
    chunk. The backward pass only scales, runs no collective, and can run once.

    Raises:
        InputError: arguments that do not fit together (before the first collective), or logits that are not finite.
    """
    if divergence not in DIVERGENCES:
        raise InputError(f"divergence_loss: expected divergence in {', '.join(DIVERGENCES)}, got {divergence!r}.")
    if not 0 <= jsd_beta <= 1:
        raise InputError(f"divergence_loss: expected jsd_beta in [0, 1], got {jsd_beta}.")
    if divergence == "sampled_token" and labels is None:
        raise InputError("divergence_loss: expected labels for divergence 'sampled_token', got None.")
    inputs = checked_inputs(
        "divergence_loss",
        (student_hidden, student_head),
        (teacher_hidden, teacher_head),
        labels=labels,
        row_weights=row_weights,
        vocab_size=vocab_size,
        temperature=temperature,
        tp_group=tp_group,
        chunk_rows=chunk_rows,
    )
    return _Call(inputs, row_weights, compiled, divergence, jsd_beta).loss(student_hidden, student_head)


@dataclass(frozen=True)
class LossCall:
    """One call of a loss whose gradients are made with it; what it sums up is for subclasses to say."""

    inputs: Inputs
    row_weights: Tensor | None
    compiled: bool

    def chunk_divergence(self, z_s: Tensor, rows: slice, blocks: RowBlocks) -> RowValues:
        """The divergence of a chunk of rows from the student's `[c, v]` logits, which it may overwrite."""
        raise NotImplementedError

    def loss(self, student_hidden: Tensor, student_head: Tensor) -> Tensor:
        """The sum over rows of weight x divergence, differentiable with respect to the arguments."""
        wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (student_hidden, student_head)]
        return _DivergenceLoss.apply(student_hidden, student_head, self, *wanted)

    @cached_property
    def weights(self) -> Tensor:
        """`[n]` float32."""
        given = self.row_weights
        return torch.ones(self.inputs.num_rows, device=self.inputs.device) if given is None else given.detach().float()

    def run(self, with_grad_hidden: bool, with_grad_head: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, and its gradients with respect to the student's hidden states and head, where wanted."""
        inputs = self.inputs
        student, partition = inputs.student, inputs.partition
        head = inputs.local_head(student)
        grad_hidden = torch.empty_like(student.hidden) if with_grad_hidden else None
        grad_head = torch.empty_like(student.head, dtype=torch.float32) if with_grad_head else None
        if grad_head is not None:
            grad_head[partition.num_local :] = 0
        buffer = LogitBuffer(head, inputs.chunk_rows, inputs.temperature)
        blocks = RowBlocks(inputs.chunk_rows, partition.num_local, inputs.device, compiled=self.compiled)
        values = []
        for rows in row_ranges(inputs.num_rows, inputs.chunk_rows):
            chunk = self.chunk_divergence(buffer.logits(student.hidden[rows]), rows, blocks)
            values.append(chunk.values)
            if grad_hidden is None and grad_head is None:
                continue
            grad_logits = buffer.narrowed(chunk.gradient(self.weights[rows] / inputs.temperature))
            if grad_hidden is not None:
                grad_hidden[rows] = hidden_gradient(grad_logits, head)
            if grad_head is not None:
                local = grad_head[: partition.num_local]
                add_head_gradient(local, grad_logits, student.hidden[rows], first=rows.start == 0)
        values = torch.cat(values)
        inputs.check_finite(values)
        if grad_hidden is not None:
            grad_hidden = all_reduce_sum(grad_hidden.float(), partition.group)
        return values @ self.weights, grad_hidden, grad_head


@dataclass(frozen=True)
class _Call(LossCall):
    divergence: str
    jsd_beta: float

    @cached_property
    def _teacher_buffer(self) -> LogitBuffer:
        inputs = self.inputs
        return LogitBuffer(inputs.local_head(inputs.teacher), inputs.chunk_rows, inputs.temperature)

    def chunk_divergence(self, z_s: Tensor, rows: slice, blocks: RowBlocks) -> RowValues:
        z_t = self._teacher_buffer.logits(self.inputs.teacher.hidden[rows])
        partition = self.inputs.partition
        if self.divergence == "sampled_token":
            assert self.inputs.labels is not None, "checked on entry"
            return row_functions.sampled_token(z_s, z_t, self.inputs.labels[rows], blocks, partition)
        if self.divergence == "jsd" and 0 < self.jsd_beta < 1:
            return row_functions.jsd(z_s, z_t, blocks, partition, beta=self.jsd_beta)
        # At its ends the generalised JSD is taken for the divergence that it tends to, divided by its vanishing weight.
        if self.divergence == "reverse_kl" or (self.divergence == "jsd" and self.jsd_beta == 1):
            return row_functions.reverse_kl(z_s, z_t, blocks, partition)
        return row_functions.forward_kl(z_s, z_t, blocks, partition)


class _DivergenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_hidden: Tensor, student_head: Tensor, call: LossCall, for_hidden: bool, for_head: bool
    ) -> Tensor:
        loss, *grads = call.run(for_hidden, for_head)
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
                "divergence_loss: backward ran a second time, but the first handed its gradients over; make a new loss."
            )
        # Without a reference of ours, autograd takes the tensors as they are instead of copying them.
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(grad_outputs[0]) for grad in grads), None, None, None
