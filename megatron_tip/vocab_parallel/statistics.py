"""Per-token statistics of student p and teacher q, both given as hidden states and head shards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from megatron_tip.errors import InputError
from megatron_tip.records import TokenStatistics
from megatron_tip.vocab_parallel.collectives import all_reduce_sum
from megatron_tip.vocab_parallel.inputs import Inputs
from megatron_tip.vocab_parallel.partition import VocabPartition
from megatron_tip.vocab_parallel.topk import global_topk


@torch.no_grad()
def token_statistics(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    labels: Tensor | None = None,
    support_size: int = 16,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    with_jsd: bool = False,
    with_support: bool = False,
) -> TokenStatistics:
    """The `TokenStatistics` of n rows: `[n]` float32, without gradient, equal on all ranks of `tp_group`.

    Args:
        student_hidden, teacher_hidden: `[n, H]` float32, bfloat16 or float16, the same on all ranks of `tp_group`; the
            models' H may differ. Hidden states that are sequence-parallel are gathered before.
        student_head, teacher_head: `[V_padded / tp, H]`, this rank's rows of the output layer, in its model's dtype.
        labels: `[n]` int64 in [0, vocab_size): the sampled tokens, whose logprobs are then returned.
        support_size: K of the top-K sets; a K above the vocabulary means the whole vocabulary.
        vocab_size: number of real ids; rows of the padded vocabulary from there on have probability zero.
            `None`: no padding.
        temperature: divides the logits of both models.
        tp_group: over which both heads are sharded in equal parts; `None`: not sharded.
        chunk_rows: rows whose logits exist at a time; `None`: chosen from the shapes.
        with_jsd, with_support: also return the JSD, and the top-K ids with their own model's logprobs.

    Collectives: 1 all-gather and 1 all-reduce a chunk, one more all-reduce with `with_jsd`. No rows: one empty chunk.

    Raises:
        InputError: arguments that do not fit together (before the first collective), or logits that are not finite.
    """
    inputs = Inputs.checked(
        "token_statistics",
        (student_hidden, student_head),
        (teacher_hidden, teacher_head),
        labels=labels,
        vocab_size=vocab_size,
        temperature=temperature,
        tp_group=tp_group,
        chunk_rows=chunk_rows,
    )
    if support_size < 1:
        raise InputError(f"token_statistics: expected support_size of at least 1, got {support_size}.")
    support_size = min(support_size, inputs.partition.vocab_size)
    return TokenStatistics.concatenate(
        [_chunk_statistics(inputs, rows, support_size, with_jsd, with_support) for rows in inputs.chunks()]
    )


def _chunk_statistics(
    inputs: Inputs, rows: slice, support_size: int, with_jsd: bool, with_support: bool
) -> TokenStatistics:
    partition = inputs.partition
    z = [inputs.logits(model, rows) for model in (0, 1)]
    (student_top, student_ids), (teacher_top, teacher_ids) = global_topk(z, support_size, partition)
    z_s, z_t = z[0] - student_top[:, :1], z[1] - teacher_top[:, :1]

    # One all-reduce of partial sums and of the logits that one rank owns and the others lack.
    e_s, e_t, difference = z_s.exp(), z_t.exp(), z_s - z_t
    sums = [e_s, e_t, e_s * z_s, e_t * z_t, e_s * difference, e_t * difference]
    columns = [torch.stack([term.sum(-1) for term in sums], -1)]
    columns += [_owned(z_t, student_ids, partition), _owned(z_s, teacher_ids, partition)]
    if inputs.labels is not None:
        ids = inputs.labels[rows].unsqueeze(1)
        columns += [_owned(z_s, ids, partition), _owned(z_t, ids, partition)]
    reduced = all_reduce_sum(torch.cat(columns, -1), partition.group)
    sums, t_on_s, s_on_t, *label_logits = reduced.split([column.shape[1] for column in columns], -1)

    sum_s, sum_t, e_s_z_s, e_t_z_t, e_s_difference, e_t_difference = sums.unbind(-1)
    log_sum_s, log_sum_t = sum_s.log(), sum_t.log()
    support = _support_statistics(
        student_top - student_top[:, :1] - log_sum_s.unsqueeze(1),
        t_on_s - log_sum_t.unsqueeze(1),
        student_ids,
        s_on_t - log_sum_s.unsqueeze(1),
        teacher_top - teacher_top[:, :1] - log_sum_t.unsqueeze(1),
        teacher_ids,
    )
    asked: dict[str, Tensor] = {}
    if label_logits:
        asked["student_logprobs"] = label_logits[0].squeeze(1) - log_sum_s
        asked["teacher_logprobs"] = label_logits[1].squeeze(1) - log_sum_t
    if with_jsd:
        asked["jsd"] = _jsd(z_s - log_sum_s.unsqueeze(1), z_t - log_sum_t.unsqueeze(1), partition)
    if with_support:
        asked["student_support_ids"] = student_ids
        asked["student_support_logprobs"] = student_top - student_top[:, :1] - log_sum_s.unsqueeze(1)
        asked["teacher_support_ids"] = teacher_ids
        asked["teacher_support_logprobs"] = teacher_top - teacher_top[:, :1] - log_sum_t.unsqueeze(1)
    # Rounding can put a divergence of nearly equal distributions a hair below its bound, 0.
    return TokenStatistics(
        student_entropy=(log_sum_s - e_s_z_s / sum_s).clamp(min=0),
        teacher_entropy=(log_sum_t - e_t_z_t / sum_t).clamp(min=0),
        reverse_kl=(e_s_difference / sum_s - log_sum_s + log_sum_t).clamp(min=0),
        forward_kl=(log_sum_s - log_sum_t - e_t_difference / sum_t).clamp(min=0),
        **support,
        **asked,
    )


def _owned(logits: Tensor, ids: Tensor, partition: VocabPartition) -> Tensor:
    """`[c, k]` logits at global `ids`, zero where another rank owns the id."""
    columns = ids - partition.vocab_start_index
    mine = (columns >= 0) & (columns < logits.shape[1])
    if not logits.shape[1]:
        return logits.new_zeros(ids.shape)
    return logits.gather(1, columns.clamp(0, logits.shape[1] - 1)) * mine


def _support_statistics(
    p_on_s: Tensor, q_on_s: Tensor, student_ids: Tensor, p_on_t: Tensor, q_on_t: Tensor, teacher_ids: Tensor
) -> dict[str, Tensor]:
    """The statistics over both supports from `[c, K]` logprobs of p and q on S_S and S_T. TA-OPD, Eq. 9, 10, 17."""
    same = student_ids.unsqueeze(2) == teacher_ids.unsqueeze(1)
    s_in_t, t_in_s = same.any(2), same.any(1)
    overlap = t_in_s.sum(-1).float()
    lower_bound = (q_on_t.exp() * t_in_s).sum(-1)
    # The union: all of S_T, and S_S without the ids that S_T has too.
    p = torch.cat([p_on_t, p_on_s.masked_fill(s_in_t, float("-inf"))], -1).log_softmax(-1)
    q = torch.cat([q_on_t, q_on_s.masked_fill(s_in_t, float("-inf"))], -1).log_softmax(-1)
    return {
        "support_divergence": (q.exp() * (q - p).nan_to_num(nan=0.0)).sum(-1).clamp(min=0),
        "compatibility": q_on_s.exp().sum(-1),
        "compatibility_lower_bound": lower_bound,
        "support_overlap": overlap,
        "support_jaccard": overlap / (2 * student_ids.shape[1] - overlap),
        "shared_teacher_mass": lower_bound / q_on_t.exp().sum(-1),
        "student_mass_on_teacher_support": p_on_t.exp().sum(-1),
    }


def _jsd(log_p: Tensor, log_q: Tensor, partition: VocabPartition) -> Tensor:
    """`[c]` JSD (beta 1/2) of local shards of log p and log q. One all-reduce."""
    log_ratio = log_q - log_p
    log_mixture = softplus(log_ratio) - torch.log(torch.tensor(2.0, device=log_p.device))  # ln(m / p)
    local = (log_q.exp() * (log_ratio - log_mixture) - log_p.exp() * log_mixture).sum(-1) / 2
    return all_reduce_sum(local, partition.group).clamp(min=0)
