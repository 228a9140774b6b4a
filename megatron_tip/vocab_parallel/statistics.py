"""Per-token statistics of student p and teacher q, both given as hidden states and head shards."""

import torch
from torch import Tensor

from megatron_tip.errors import InputError
from megatron_tip.statistics import STATISTICS, TokenStatistics
from megatron_tip.vocab_parallel import kernels
from megatron_tip.vocab_parallel.chunks import Chunk
from megatron_tip.vocab_parallel.collectives import all_reduce_sum
from megatron_tip.vocab_parallel.inputs import HiddenAndHead, checked_inputs
from megatron_tip.vocab_parallel.row_functions import jsd_of_normalised
from megatron_tip.vocab_parallel.softmax_normaliser import SoftmaxNormaliser
from megatron_tip.vocab_parallel.topk import exchange_topk
from megatron_tip.vocab_parallel.vocabulary import ShardedVocabulary

FULL_STATISTICS = frozenset(name for name, statistic in STATISTICS.items() if statistic.needs != "top_k_alone")
"""The statistics available from a teacher whose whole distribution is known."""


@torch.no_grad()
def token_statistics(
    student: HiddenAndHead,
    teacher: HiddenAndHead,
    vocabulary: ShardedVocabulary,
    *,
    labels: Tensor | None = None,
    support_size: int = 16,
    with_jsd: bool = False,
    with_support: bool = False,
) -> TokenStatistics:
    """Returns the `TokenStatistics` of n rows: `[n]` float32, without gradient, equal on all ranks of the tp group.

    Args:
        student, teacher: each model's hidden states `[n, H]` in float32, bfloat16 or float16, the same on all ranks of
            the tp group, and this rank's rows of its output layer, `[V_padded / tp, H]`, in the same dtype. The models'
            H may differ. Gather sequence-parallel hidden states first.
        vocabulary: the real ids, the temperature of both models, and the tp group.
        labels: `[n]` int64 in [0, vocab_size): the sampled tokens; their logprobs are then returned.
        support_size: K of the top-K sets, at most the vocabulary size.
        with_jsd, with_support: also return the JSD, and the top-K ids with their own model's logprobs.

    Collectives: 1 all-gather and 1 all-reduce per chunk, 1 more all-reduce with `with_jsd`; 1 all-gather of 40 bytes
    per call. Without rows there is one empty chunk. Arithmetic on logits is float32.

    Raises:
        InputError: arguments do not match, or logits are not finite; on all ranks.
    """
    if support_size < 1:
        raise InputError(f"token_statistics: expected support_size of at least 1, got {support_size}.")
    inputs = checked_inputs("token_statistics", (student, teacher), vocabulary, labels=labels)
    support_size = min(support_size, inputs.partition.vocab_size)
    parts = [
        _chunk_statistics(chunk, None if labels is None else labels[chunk.rows], support_size, with_jsd, with_support)
        for chunk in inputs.chunks()
    ]
    result = TokenStatistics.concatenate(parts)
    assert result.reverse_kl is not None, "computed above"
    assert result.forward_kl is not None, "computed above"
    inputs.check_finite(result.reverse_kl + result.forward_kl)
    return result


def _chunk_statistics(
    chunk: Chunk, labels: Tensor | None, support_size: int, with_jsd: bool, with_support: bool
) -> TokenStatistics:
    logits, partition = chunk.logits, chunk.partition
    local_sums, *group_maxima = chunk.blocks.run(kernels.statistics_sums, *logits)
    sums, tops = exchange_topk(logits, group_maxima, local_sums, support_size, partition)
    (top_s, ids_s), (top_t, ids_t) = tops
    maxima, (sum_s, sum_t, sum_s_x, sum_t_x, sum_s_d, sum_t_d) = sums[..., :2], sums[..., 2:].unbind(-1)
    normaliser = SoftmaxNormaliser.of(maxima, sums[..., 2:4])

    # Known only to the owner of an id: each model's logprob on the other's support, and both on the label.
    questions = [(0, ids_t), (1, ids_s)]
    if labels is not None:
        questions += [(model, labels.unsqueeze(1)) for model in (0, 1)]
    answers = []
    for model, ids in questions:
        owned, is_owned = partition.owned(logits[model], ids)
        answers.append(torch.where(is_owned, normaliser.logprobs(owned, model), 0.0))
    reduced = all_reduce_sum(torch.cat(answers, 1), partition.group)
    p_on_t, q_on_s, *on_label = reduced.split([ids.shape[1] for _, ids in questions], 1)
    p_on_s, q_on_t = normaliser.logprobs(top_s, 0), normaliser.logprobs(top_t, 1)

    asked: dict[str, Tensor] = {}
    if on_label:
        asked["student_logprobs"], asked["teacher_logprobs"] = (column.squeeze(1) for column in on_label)
    if with_support:
        asked["student_support_ids"], asked["student_support_logprobs"] = ids_s, p_on_s
        asked["teacher_support_ids"], asked["teacher_support_logprobs"] = ids_t, q_on_t
    if with_jsd:
        asked["jsd"] = jsd_of_normalised(chunk, normaliser, beta=0.5).values.clamp(min=0)
    shift = normaliser.log_ratio_shift
    # Rounding can make a nearly zero entropy or divergence slightly negative.
    return TokenStatistics(
        student_entropy=-normaliser.expectation(0, sum_s, sum_s_x, -normaliser.lse[..., 0]).clamp(max=0),
        teacher_entropy=-normaliser.expectation(1, sum_t, sum_t_x, -normaliser.lse[..., 1]).clamp(max=0),
        reverse_kl=normaliser.expectation(0, sum_s, sum_s_d, shift).clamp(min=0),
        forward_kl=-normaliser.expectation(1, sum_t, sum_t_d, shift).clamp(max=0),
        **support_statistics(p_on_s, q_on_s, ids_s, p_on_t, q_on_t, ids_t),
        **asked,
    )


def support_statistics(
    p_on_s: Tensor, q_on_s: Tensor, ids_s: Tensor, p_on_t: Tensor, q_on_t: Tensor, ids_t: Tensor
) -> dict[str, Tensor]:
    """Returns the statistics over both supports, from `[c, K]` logprobs of p, q on S_S, S_T. TA-OPD Eq. 9, 10, 17."""
    same = ids_s.unsqueeze(2) == ids_t.unsqueeze(1)
    s_in_t, t_in_s = same.any(2), same.any(1)
    overlap = t_in_s.sum(-1).float()
    lower_bound = (q_on_t.exp() * t_in_s).sum(-1)
    # The union: S_T, and the ids of S_S that are not in S_T.
    union_p = torch.cat([p_on_t, p_on_s.masked_fill(s_in_t, float("-inf"))], 1).log_softmax(-1)
    union_q = torch.cat([q_on_t, q_on_s.masked_fill(s_in_t, float("-inf"))], 1).log_softmax(-1)
    terms = union_q.exp() * (union_q - union_p)
    is_first_choice = same[:, 0]
    choice_rank = torch.where(is_first_choice.any(1), is_first_choice.int().argmax(1), ids_t.shape[1])
    left_out = torch.cat([torch.zeros_like(s_in_t), s_in_t], 1)
    return {
        "support_divergence": terms.masked_fill(left_out, 0.0).sum(-1).clamp(min=0),
        "compatibility": q_on_s.exp().sum(-1),
        "compatibility_lower_bound": lower_bound,
        "support_overlap": overlap,
        "support_jaccard": overlap / (2 * ids_s.shape[1] - overlap),
        "shared_teacher_mass": lower_bound / q_on_t.exp().sum(-1),
        "student_mass_on_teacher_support": p_on_t.exp().sum(-1),
        "choice_rank": choice_rank.float(),
    }
