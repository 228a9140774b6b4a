"""The cases of tools/bench_vocab_parallel.py from other packages, called as a user calls them, and the plain ones."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_vocab_parallel_work import BETAS, Call, Work
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _divergence_of_logits(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Returns the sum over rows of the generalised JSD, written with `log_softmax` and `kl_div`."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if beta in (0.0, 1.0):
        towards, measured = (log_p, log_q) if beta == 0 else (log_q, log_p)
        return F.kl_div(towards, measured, reduction="sum", log_target=True)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    parts = [F.kl_div(log_m, logprobs, reduction="sum", log_target=True) for logprobs in (log_p, log_q)]
    return (1 - beta) * parts[0] + beta * parts[1]


def plain(work: Work) -> Call:
    """Returns `log_softmax` and `kl_div` of all logits at once."""
    return _of_logits(work, lambda s, t: _divergence_of_logits(s, t, BETAS[work.divergence]))


def trl_jsd(work: Work) -> Call:
    """Returns TRL's generalised JSD, which takes logits."""
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]  (of another environment)

    beta = BETAS[work.divergence]
    return _of_logits(work, lambda s, t: GKDTrainer.generalized_jsd_loss(s, t, beta=beta, reduction="sum"))


def _of_logits(work: Work, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Call:
    hidden, head, teacher_hidden, teacher_head = work.models

    def call() -> Tensor:
        with torch.no_grad():
            teacher = teacher_hidden @ teacher_head.T
        loss = loss_of(hidden @ head.T, teacher)
        loss.backward()
        return loss.detach()

    return call


def checkpointed(work: Work) -> Call:
    """Returns the plain loss in chunks, each recomputed in the backward pass."""
    hidden, head, teacher_hidden, teacher_head = work.models
    beta, chunk_rows = BETAS[work.divergence], work.options["chunk_rows"]

    def of_chunk(student: Tensor, teacher: Tensor) -> Tensor:
        return _divergence_of_logits(student @ head.T, teacher @ teacher_head.T, beta)

    def call() -> Tensor:
        chunks = zip(hidden.split(chunk_rows), teacher_hidden.split(chunk_rows), strict=True)
        losses: list[Any] = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.detach()

    return call


def trl_chunked(work: Work) -> Call:
    """Returns the function that TRL's DistillationTrainer calls, on hidden states."""
    from trl.kernels.chunked_divergence import (  # pyright: ignore[reportMissingImports]
        ChunkedDivergenceFunction,
    )

    hidden, head, teacher_hidden, teacher_head = work.models

    def call() -> Tensor:
        beta = BETAS[work.divergence]
        values, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, beta)
        loss = values.sum()
        loss.backward()
        return loss.detach()

    return call


def liger(work: Work) -> Call:
    """Returns Liger's fused linear JSD, only its distillation part; its value is the mean over rows."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    hidden, head, teacher_hidden, teacher_head = work.models
    compute = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETAS[work.divergence],
        chunk_size=work.options["chunk_rows"],
        compiled=work.options.get("compiled", False),
    )
    labels = hidden.new_zeros(len(hidden), dtype=torch.int64)

    def call() -> Tensor:
        loss = compute(hidden, head, teacher_hidden, teacher_head, labels)
        loss.backward()
        return loss.detach()

    return call
