"""Divergences between student p and teacher q as losses, with their gradients made in the forward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel.collectives import all_gather, all_reduce_sum
from megatron_tip.vocab_parallel.inputs import Inputs

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
            (TA-OPD after Eq. 6), with the gradient (log p(y) - log q(y)) d log p(y): over y drawn from p at this temperature
            its mean is exactly the gradient of the reverse KL, whereas plain differentiation has mean zero.
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
    inputs = Inputs.checked(
        "divergence_loss",
        (student_hidden, student_head),
        (teacher_hidden, teacher_head),
        labels=labels,
        vocab_size=vocab_size,
        temperature=temperature,
        tp_group=tp_group,
        chunk_rows=chunk_rows,
    )
    if divergence not in DIVERGENCES:
        raise InputError(
            f"divergence_loss: expected divergence to be one of {', '.join(DIVERGENCES)}, got {divergence!r}."
        )
    if not 0 <= jsd_beta <= 1:
        raise InputError(f"divergence_loss: expected jsd_beta in [0, 1], got {jsd_beta}.")
    if divergence == "sampled_token" and labels is None:
        raise InputError("divergence_loss: expected labels for divergence 'sampled_token', got None.")
    if divergence == "jsd" and jsd_beta in (0, 1):
        divergence = "reverse_kl" if jsd_beta else "forward_kl"
    if row_weights is None:
        row_weights = torch.ones(inputs.num_rows, device=student_hidden.device)
    if row_weights.shape != (inputs.num_rows,):
        raise InputError(
            f"divergence_loss: expected row_weights [{inputs.num_rows}], got {list(row_weights.shape)}; one a row."
        )
    wants = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (student_hidden, student_head))
    return _DivergenceLoss.apply(
        student_hidden, student_head, inputs, divergence, row_weights.detach().float(), jsd_beta, wants
    )


class _DivergenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_head, inputs: Inputs, divergence, row_weights, jsd_beta, wants):
        hidden, head = inputs.hidden[0], inputs.head[0]
        num_local = inputs.partition.num_local
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device) if wants[0] else None
        grad_head = torch.zeros(head.shape, device=head.device) if wants[1] else None
        loss = torch.zeros((), device=hidden.device)
        for rows in inputs.chunks():
            values, grad_logits = _chunk_divergence(inputs, rows, divergence, jsd_beta, any(wants))
            loss += values @ row_weights[rows]
            if grad_logits is None:
                continue
            grad_logits *= (row_weights[rows] / inputs.temperature).unsqueeze(1)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ head[:num_local]).float()
            if grad_head is not None:
                grad_head[:num_local] += (grad_logits.T @ hidden[rows]).float()
        if grad_hidden is not None:
            all_reduce_sum(grad_hidden, inputs.partition.group)
        ctx.grads = (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_head is None else grad_head.to(head.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        if ctx.grads is None:
            raise RuntimeError(
                "divergence_loss: backward ran twice; its gradients are handed over, not kept. Call it again."
            )
        # Dropping our reference lets autograd keep the tensors without a copy.
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(grad_loss) for grad in grads), *[None] * 5


def _chunk_divergence(
    inputs: Inputs, rows: slice, divergence: str, beta: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """`[c]` divergences, equal on all ranks, and `[c, v]` gradients with respect to the student's local logits."""
    partition, group = inputs.partition, inputs.partition.group
    z_s, z_t = (inputs.logits(model, rows) for model in (0, 1))
    log_p, log_q = _normalised(z_s, z_t, inputs)
    p = log_p.exp()
    if divergence == "forward_kl":
        q = log_q.exp()
        values = all_reduce_sum((q * (log_q - log_p)).sum(-1), group)
        return values, p - q if with_grad else None
    if divergence == "reverse_kl":
        terms = log_p - log_q
        values = all_reduce_sum((p * terms).sum(-1), group)
        return values, p * (terms - values.unsqueeze(1)) if with_grad else None
    if divergence == "jsd":
        log_ratio = log_q - log_p
        log_mixture = torch.logaddexp(
            torch.tensor(math.log1p(-beta), device=p.device), log_ratio + math.log(beta)
        )  # ln(m / p)
        teacher = (log_q.exp() * (log_ratio - log_mixture)).sum(-1)
        student = -(p * log_mixture).sum(-1)
        teacher, student = all_reduce_sum(torch.stack([teacher, student]), group)
        values = beta * teacher + (1 - beta) * student
        return values, (1 - beta) * p * (-log_mixture - student.unsqueeze(1)) if with_grad else None
    columns = inputs.labels[rows].unsqueeze(1) - partition.vocab_start_index  # type: ignore[index]
    is_label = torch.arange(p.shape[1], device=p.device) == columns
    values = all_reduce_sum(((log_p - log_q) * is_label).sum(-1), group)
    return values, values.unsqueeze(1) * (is_label.float() - p) if with_grad else None


def _normalised(z_s: Tensor, z_t: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """log p and log q of the local ids. One all-gather."""
    maxima = [z.amax(-1) if z.shape[1] else z.new_full(z.shape[:1], float("-inf")) for z in (z_s, z_t)]
    sums = [(z - m.unsqueeze(1)).exp().sum(-1) for z, m in zip((z_s, z_t), maxima, strict=True)]
    m, sums = all_gather(torch.stack([torch.stack(maxima), torch.stack(sums)]), inputs.partition.group).unbind(1)
    top = m.amax(0)
    log_sum = (sums * (m - top).exp()).sum(0).log()
    # The maximum goes first: it is exact, and what is left of the largest logits is small.
    return tuple(z - top[i].unsqueeze(1) - log_sum[i].unsqueeze(1) for i, z in enumerate((z_s, z_t)))
