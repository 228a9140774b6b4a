"""Losses for a teacher with only some known log-probabilities, with gradients computed in the forward pass.

p is the student's distribution, q the teacher's. U is a row's set of ids with known q; all other ids form one bucket,
the tail, which holds the remaining mass.
"""

import torch
from torch import Tensor

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import kernels, row_functions
from megatron_tip.vocab_parallel.chunks import Chunk
from megatron_tip.vocab_parallel.collectives import all_gather
from megatron_tip.vocab_parallel.inputs import HiddenAndHead, checked_inputs
from megatron_tip.vocab_parallel.loss import RowFunction, weighted_sum
from megatron_tip.vocab_parallel.row_functions import RowValues
from megatron_tip.vocab_parallel.softmax_normaliser import SoftmaxNormaliser
from megatron_tip.vocab_parallel.vocabulary import ShardedVocabulary

TOPK_DIVERGENCES = ("topk_reverse_kl", "sampled_token")

NO_ID = -1
"""The placeholder for "no id", so that rows can have different numbers of known ids."""

# The rounding error of a sum of float32 probabilities near 1: a smaller teacher tail is not known.
_TEACHER_TAIL_FLOOR = 1e-6


def topk_divergence_loss(
    student: HiddenAndHead,
    vocabulary: ShardedVocabulary,
    *,
    divergence: str = "topk_reverse_kl",
    teacher_ids: Tensor | None = None,
    teacher_id_logprobs: Tensor | None = None,
    labels: Tensor | None = None,
    teacher_label_logprobs: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Returns the sum over rows of weight x divergence: a float32 scalar, equal on all ranks of the tp group.

    Gradient, memory, sharding, `student`, `row_weights` and `labels` are as in `divergence_loss`.

    Args:
        vocabulary: its temperature applies to the student only; the teacher's log-probabilities are used as given.
        divergence: "topk_reverse_kl", KL(p || q) with all ids outside U in one bucket:
            Σ_U p ln(p / q) + p_tail ln(p_tail / q_tail), a lower bound of the full KL(p || q) that is exact if U is the
            vocabulary; "sampled_token", log p(y) - log q(y) of the label y, with the gradient as in `divergence_loss`.
        teacher_ids: `[n, m]` int64, the distinct ids of U, padded with -1.
        teacher_id_logprobs: `[n, m]` float32, ln q of those ids, ignored at -1. Both are the same on all ranks.
        teacher_label_logprobs: `[n]` float32, ln q(y).

    Collectives: 1 all-gather per chunk, of 4 (2 + m) bytes per row; then 1 all-reduce of the hidden states' gradient.

    Raises:
        InputError: arguments do not match (before the first collective), or values are not finite.
    """
    where, n = "topk_divergence_loss", len(student[0])
    if divergence not in TOPK_DIVERGENCES:
        raise InputError(f"{where}: expected divergence in {', '.join(TOPK_DIVERGENCES)}, got {divergence!r}.")
    if divergence == "sampled_token":
        if labels is None or teacher_label_logprobs is None or teacher_label_logprobs.shape != (n,):
            raise InputError(f"{where}: expected labels and teacher_label_logprobs [{n}] for 'sampled_token'.")
        row_function = _sampled_token(labels, teacher_label_logprobs)
    else:
        if teacher_ids is None or teacher_id_logprobs is None or teacher_ids.shape != teacher_id_logprobs.shape:
            raise InputError(f"{where}: expected teacher_ids and teacher_id_logprobs of the same shape [{n}, m].")
        if teacher_ids.dim() != 2 or len(teacher_ids) != n or teacher_ids.dtype != torch.int64:
            got = f"{list(teacher_ids.shape)} {teacher_ids.dtype}"
            raise InputError(f"{where}: expected teacher_ids [{n}, m] torch.int64, got {got}.")
        row_function = _topk_reverse_kl(teacher_ids, teacher_id_logprobs)
    inputs = checked_inputs(where, (student,), vocabulary, labels=labels, row_weights=row_weights)
    return weighted_sum(inputs, student, row_weights, row_function)


def _sampled_token(labels: Tensor, teacher_logprobs: Tensor) -> RowFunction:
    return lambda chunk: row_functions.sampled_token(chunk, labels[chunk.rows], teacher_logprobs[chunk.rows])


def _topk_reverse_kl(ids: Tensor, teacher_logprobs: Tensor) -> RowFunction:
    return lambda chunk: topk_reverse_kl(chunk, ids[chunk.rows], teacher_logprobs[chunk.rows])


def topk_reverse_kl(chunk: Chunk, ids: Tensor, teacher_logprobs: Tensor) -> RowValues:
    """Returns L = Σ_b p_b (ln p_b - ln q_b) over the ids of U and the tail. One all-gather.

    Gradient p_j (ln p_b - ln q_b - L), b the bucket of j: all ids of the tail share the bucket's log-ratio.
    """
    (z,), partition = chunk.logits, chunk.partition
    is_known = ids != NO_ID
    tail, on_ids = tail_and_known(chunk, ids)
    log_p, log_p_tail = log_buckets(tail, on_ids, is_known)
    log_ratio = torch.where(is_known, log_p - teacher_logprobs, 0.0)
    p = log_p.exp()
    tail_log_ratio = log_p_tail - teacher_log_tail(teacher_logprobs, is_known)
    p_tail = log_p_tail.exp()
    values = (p * log_ratio).sum(-1) + p_tail * torch.where(p_tail > 0, tail_log_ratio, 0.0)

    def gradient(weights: Tensor) -> Tensor:
        # The known ids' logits are hidden and contribute nothing here; their gradient is added below.
        maximum = tail.maxima[partition.rank, :, 0]
        lse = tail.lse[partition.rank, :, 0] - log_p_tail  # of the whole row in this rank's frame of the tail
        scale = weights * torch.where(p_tail > 0, tail_log_ratio - values, 0.0)
        chunk.blocks.run(kernels.scaled_probabilities, z, torch.stack([maximum, lse, scale], 1))
        partition.add_owned(z, ids, weights.unsqueeze(1) * p * (log_ratio - values.unsqueeze(1)))
        return z

    return RowValues(values, gradient)


def tail_and_known(chunk: Chunk, ids: Tensor) -> tuple[SoftmaxNormaliser, Tensor]:
    """Returns the normaliser of the tail, and `[c, m]` logits of `ids` (0 at -1), on all ranks.

    Overwrites the logits of `ids` in the chunk to hide them. One all-gather.
    """
    (z,), partition = chunk.logits, chunk.partition
    owned, _ = partition.owned(z, ids)
    partition.hide(z, ids)
    (sums,) = chunk.blocks.run(kernels.partition_sums, z)
    gathered = all_gather(torch.cat([sums, owned], 1), partition.group)
    found = gathered[..., 2:].sum(0)  # one rank owns an id, the others hold zero
    return SoftmaxNormaliser.of(gathered[..., :1], gathered[..., 1:2]), found


def log_buckets(tail: SoftmaxNormaliser, logits: Tensor, is_known: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `[c, m]` ln p of the known ids, -inf elsewhere, and `[c]` ln p_tail.

    No cancellation occurs, however small the tail.
    """
    known = torch.where(is_known, logits, float("-inf"))
    maximum = torch.cat([known, tail.top], 1).amax(-1, keepdim=True)
    known, log_tail = known - maximum, tail.top - maximum + tail.log_sum
    lse = torch.cat([known, log_tail], 1).logsumexp(-1, keepdim=True)
    return known - lse, (log_tail - lse).squeeze(1)


def teacher_log_tail(logprobs: Tensor, is_known: Tensor) -> Tensor:
    """Returns `[c]` ln of the teacher's mass outside the known ids, within the accuracy of float32 logprobs."""
    mass = torch.where(is_known, logprobs.double(), float("-inf")).exp().sum(-1)
    return (1 - mass).clamp(min=_TEACHER_TAIL_FLOOR).log().float()
