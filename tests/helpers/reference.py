"""Float64 single-process formulas on full logits: what the sharded, chunked code must equal.

Equation numbers: TIP (arXiv:2604.14084) and TA-OPD (arXiv:2605.26844).
"""

import math

import torch
from torch import Tensor


def full_logits(hidden: Tensor, head: Tensor, vocab_size: int | None = None, temperature: float = 1.0) -> Tensor:
    """`[n, vocab_size]` float64 logits of the real ids."""
    return hidden.double() @ head.double()[:vocab_size].T / temperature


def entropy(logits: Tensor) -> Tensor:
    """H(p) in nats; TIP Eq. 2 before the division by ln |V|."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def kl(from_logits: Tensor, to_logits: Tensor) -> Tensor:
    """KL(from || to); `kl(student, teacher)` is the reverse KL of TIP Eq. 1, 3 and TA-OPD Eq. 6."""
    a, b = from_logits.log_softmax(-1), to_logits.log_softmax(-1)
    return (a.exp() * (a - b)).sum(-1)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, b = beta; KL(q || p) at beta 0, KL(p || q) at beta 1."""
    if beta == 0:
        return kl(teacher_logits, student_logits)
    if beta == 1:
        return kl(student_logits, teacher_logits)
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    return beta * (log_q.exp() * (log_q - log_m)).sum(-1) + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)


def sampled_token(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """log p(y) - log q(y) (TA-OPD, after Eq. 6) whose gradient is (log p(y) - log q(y)) d log p(y)."""
    log_p = student_logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    log_q = teacher_logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    gap = (log_p - log_q).detach()
    return gap + gap * (log_p - log_p.detach())


def divergence(name: str, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, beta: float) -> Tensor:
    """`[n]` divergences by the name that `divergence_loss` knows them by."""
    if name == "reverse_kl":
        return kl(student_logits, teacher_logits)
    if name == "forward_kl":
        return kl(teacher_logits, student_logits)
    if name == "jsd":
        return jsd(student_logits, teacher_logits, beta)
    assert labels is not None
    return sampled_token(student_logits, teacher_logits, labels)


def top_ids(logits: Tensor, k: int) -> Tensor:
    """`[n, K]` ids of the K largest logits, ties by lower id."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def statistics(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, support_size: int) -> dict[str, Tensor]:
    """Every field of TokenStatistics, row by row and set by set as the papers write them."""
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    k = min(support_size, student_logits.shape[1])
    student_ids, teacher_ids = top_ids(student_logits, k), top_ids(teacher_logits, k)
    rows = [_support_row(*row) for row in zip(log_p, log_q, student_ids, teacher_ids, strict=True)]
    names = (
        "support_divergence",
        "compatibility",
        "compatibility_lower_bound",
        "support_overlap",
        "support_jaccard",
        "shared_teacher_mass",
        "student_mass_on_teacher_support",
        "choice_rank",
    )
    columns = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(names))
    return dict(zip(names, columns.unbind(1), strict=True)) | {
        "student_entropy": entropy(student_logits),
        "teacher_entropy": entropy(teacher_logits),
        "reverse_kl": kl(student_logits, teacher_logits),
        "forward_kl": kl(teacher_logits, student_logits),
        "jsd": jsd(student_logits, teacher_logits),
        "student_logprobs": log_p.gather(1, labels[:, None]).squeeze(1),
        "teacher_logprobs": log_q.gather(1, labels[:, None]).squeeze(1),
        "student_support_ids": student_ids,
        "teacher_support_ids": teacher_ids,
        "student_support_logprobs": log_p.gather(1, student_ids),
        "teacher_support_logprobs": log_q.gather(1, teacher_ids),
    }


def _support_row(log_p: Tensor, log_q: Tensor, student_ids: Tensor, teacher_ids: Tensor) -> list[float]:
    s, t = set(student_ids.tolist()), set(teacher_ids.tolist())
    union, both = sorted(s | t), sorted(s & t)
    q_mass = log_q.exp()
    lower_bound = q_mass[both].sum()  # TA-OPD Eq. 17
    return [
        kl(log_q[union], log_p[union]).item(),  # TA-OPD Eq. 9: log_softmax inside renormalises on the union
        q_mass[sorted(s)].sum().item(),  # TA-OPD Eq. 10
        lower_bound.item(),
        float(len(both)),
        len(both) / len(union),
        (lower_bound / q_mass[sorted(t)].sum()).item(),
        log_p.exp()[sorted(t)].sum().item(),
        float([*teacher_ids.tolist(), student_ids[0].item()].index(student_ids[0].item())),
    ]
