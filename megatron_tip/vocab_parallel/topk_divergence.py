"""Losses against a teacher of whom only some log-probabilities are known, with gradients made in the forward pass.

p is the student's distribution, q the teacher's. U is a row's set of ids whose q is known; what lies outside is one
bucket, the tail, whose mass is what U leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import kernels, row_functions
from megatron_tip.vocab_parallel.chunks import RowBlocks
from megatron_tip.vocab_parallel.collectives import all_gather
from megatron_tip.vocab_parallel.divergence import LossCall
from megatron_tip.vocab_parallel.inputs import checked_inputs
from megatron_tip.vocab_parallel.normalisation import Normaliser
from megatron_tip.vocab_parallel.partition import VocabPartition
from megatron_tip.vocab_parallel.row_functions import RowValues

TOPK_DIVERGENCES = ("topk_reverse_kl", "sampled_token")

NO_ID = -1
"""Stands in a row of ids for "no id here", so that rows may know different numbers of them."""

# What a sum of float32 probabilities of about 1 can be off by: a smaller tail of the teacher's is not known.
_TEACHER_TAIL_FLOOR = 1e-6
# Hides a logit from the tail: below every one, yet finite, so that no inf - inf arises.
_HIDDEN = -1e30


def topk_divergence_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    *,
    divergence: str = "topk_reverse_kl",
    teacher_ids: Tensor | None = None,
    teacher_id_logprobs: Tensor | None = None,
    labels: Tensor | None = None,
    teacher_label_logprobs: Tensor | None = None,
    row_weights: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """The sum over rows of weight x divergence: a float32 scalar, equal on all ranks of `tp_group`.

    Gradient, memory and sharding are those of `divergence_loss`.

    Args:
        student_hidden: `[n, H]`, the same on all ranks of `tp_group`. student_head: `[V_padded / tp, H]`, this rank's.
        divergence: "topk_reverse_kl", KL(p || q) after all ids outside U were put into one bucket:
            Σ_U p ln(p / q) + p_tail ln(p_tail / q_tail), a lower bound of the full KL(p || q) that is exact where U is
            the vocabulary; "sampled_token", log p(y) - log q(y) of the label y, with the gradient that
            `divergence_loss` gives it.
        teacher_ids: `[n, m]` int64, the distinct ids of U, -1 where a row knows fewer. teacher_id_logprobs: `[n, m]`
            float32, ln q of those ids, whatever at -1. Both are the same on all ranks.
        labels: `[n]` int64. teacher_label_logprobs: `[n]` float32, ln q(y).
        vocab_size, temperature, chunk_rows, row_weights: as of `divergence_loss`; the temperature is the student's
            alone, for the teacher's log-probabilities are what they are.

    Collectives: 1 all-gather a chunk, of 4 (2 + m) bytes a row; then 1 all-reduce of the hidden states' gradient.

    Raises:
        InputError: arguments that do not fit together (before the first collective), or values that are not finite.
    """
    where = "topk_divergence_loss"
    if divergence not in TOPK_DIVERGENCES:
        raise InputError(f"{where}: expected divergence in {', '.join(TOPK_DIVERGENCES)}, got {divergence!r}.")
    student = (student_hidden, student_head)
    n = student_hidden.shape[0]
    if divergence == "sampled_token":
        if labels is None or teacher_label_logprobs is None or teacher_label_logprobs.shape != (n,):
            raise InputError(f"{where}: expected labels and teacher_label_logprobs [{n}] for 'sampled_token'.")
    elif teacher_ids is None or teacher_id_logprobs is None or teacher_ids.shape != teacher_id_logprobs.shape:
        raise InputError(f"{where}: expected teacher_ids and teacher_id_logprobs of one shape [{n}, m].")
    elif teacher_ids.dim() != 2 or len(teacher_ids) != n or teacher_ids.dtype != torch.int64:
        raise InputError(
            f"{where}: expected teacher_ids [{n}, m] torch.int64, got {list(teacher_ids.shape)} {teacher_ids.dtype}."
        )
    inputs = checked_inputs(
        where,
        student,
        student,  # there is no other model here
        labels=labels,
        row_weights=row_weights,
        vocab_size=vocab_size,
        temperature=temperature,
        tp_group=tp_group,
        chunk_rows=chunk_rows,
    )
    known = _Known(teacher_ids, teacher_id_logprobs, teacher_label_logprobs)
    return _Call(inputs, row_weights, compiled, divergence, known).loss(student_hidden, student_head)


@dataclass(frozen=True)
class _Known:
    """What is known of the teacher; which of it, the divergence says."""

    ids: Tensor | None
    id_logprobs: Tensor | None
    label_logprobs: Tensor | None


@dataclass(frozen=True)
class _Call(LossCall):
    divergence: str
    known: _Known

    def chunk_divergence(self, z_s: Tensor, rows: slice, blocks: RowBlocks) -> RowValues:
        partition, known = self.inputs.partition, self.known
        if self.divergence == "sampled_token":
            assert self.inputs.labels is not None, "checked on entry"
            assert known.label_logprobs is not None, "checked on entry"
            return sampled_token(z_s, self.inputs.labels[rows], known.label_logprobs[rows], blocks, partition)
        assert known.ids is not None, "checked on entry"
        assert known.id_logprobs is not None, "checked on entry"
        return topk_reverse_kl(z_s, known.ids[rows], known.id_logprobs[rows], blocks, partition)


def sampled_token(
    z_s: Tensor, labels: Tensor, teacher_logprobs: Tensor, blocks: RowBlocks, partition: VocabPartition
) -> RowValues:
    """ln p(y) - ln q(y) with ln q(y) given; value and gradient are those of `row_functions.sampled_token`."""
    student = row_functions.logprobs(z_s, labels, blocks, partition)
    values = student.values - teacher_logprobs
    return RowValues(values, lambda weights: student.gradient(weights * values))


def topk_reverse_kl(
    z_s: Tensor, ids: Tensor, teacher_logprobs: Tensor, blocks: RowBlocks, partition: VocabPartition
) -> RowValues:
    """L = Σ_b p_b (ln p_b - ln q_b) over the ids of U and the tail. One all-gather.

    Gradient p_j (ln p_b - ln q_b - L) with b the bucket of j: within the tail every id moves as the bucket does.
    """
    is_known = ids != NO_ID
    tail, (on_ids,) = tail_and_known(z_s, ids, blocks, partition)
    log_p, log_p_tail = log_buckets(tail, on_ids, is_known)
    log_ratio = torch.where(is_known, log_p - teacher_logprobs, 0.0)
    p = log_p.exp()
    tail_log_ratio = log_p_tail - teacher_log_tail(teacher_logprobs, is_known)
    p_tail = log_p_tail.exp()
    values = (p * log_ratio).sum(-1) + p_tail * torch.where(p_tail > 0, tail_log_ratio, 0.0)

    def gradient(weights: Tensor) -> Tensor:
        # The known ids' logits are hidden, and so add nothing here; theirs is put in their place.
        maximum = tail.maxima[partition.rank, :, 0]
        lse = tail.lse[partition.rank, :, 0] - log_p_tail  # of the whole row in this rank's frame of the tail
        scale = weights * torch.where(p_tail > 0, tail_log_ratio - values, 0.0)
        blocks.run(kernels.scaled_probabilities, z_s, torch.stack([maximum, lse, scale], 1))
        partition.add_owned(z_s, ids, weights.unsqueeze(1) * p * (log_ratio - values.unsqueeze(1)))
        return z_s

    return RowValues(values, gradient)


def tail_and_known(
    z: Tensor, ids: Tensor, blocks: RowBlocks, partition: VocabPartition, *extra: Tensor
) -> tuple[Normaliser, tuple[Tensor, ...]]:
    """The normaliser of the ids outside `ids`, and `[c, m]` logits of `ids` (0 at -1), on all ranks. One all-gather.

    Hides the logits of `ids` in `z`. `extra`: further `[c, k]` ids, which are looked up and not hidden.
    """
    lookups = (ids, *extra)
    owned = [partition.owned(z, wanted)[0] for wanted in lookups]
    partition.add_owned(z, ids, torch.full_like(owned[0], _HIDDEN))
    (sums,) = blocks.run(kernels.partition_sums, z)
    gathered = all_gather(torch.cat([sums, *owned], 1), partition.group)
    # One rank owns an id, the others hold zero.
    found = gathered[..., 2:].sum(0).split([wanted.shape[1] for wanted in lookups], 1)
    return Normaliser.of(gathered[..., :1], gathered[..., 1:2]), tuple(found)


def log_buckets(tail: Normaliser, logits: Tensor, is_known: Tensor) -> tuple[Tensor, Tensor]:
    """`[c, m]` ln p of the known ids, -inf elsewhere, and `[c]` ln p_tail; nothing cancels, however small the tail."""
    known = torch.where(is_known, logits, float("-inf"))
    maximum = torch.cat([known, tail.top], 1).amax(-1, keepdim=True)
    known, log_tail = known - maximum, tail.top - maximum + tail.log_sum
    lse = torch.cat([known, log_tail], 1).logsumexp(-1, keepdim=True)
    return known - lse, (log_tail - lse).squeeze(1)


def teacher_log_tail(logprobs: Tensor, is_known: Tensor) -> Tensor:
    """`[c]` ln of the teacher's mass outside the known ids, as far as float32 log-probabilities tell it."""
    mass = torch.where(is_known, logprobs.double(), float("-inf")).exp().sum(-1)
    return (1 - mass).clamp(min=_TEACHER_TAIL_FLOOR).log().float()
