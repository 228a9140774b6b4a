"""Divergence losses between student p and teacher q, both given as hidden states and head shards."""

from torch import Tensor

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import row_functions
from megatron_tip.vocab_parallel.inputs import HiddenAndHead, checked_inputs
from megatron_tip.vocab_parallel.loss import RowFunction, weighted_sum
from megatron_tip.vocab_parallel.vocabulary import ShardedVocabulary

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "sampled_token")


def divergence_loss(
    student: HiddenAndHead,
    teacher: HiddenAndHead,
    vocabulary: ShardedVocabulary,
    *,
    divergence: str = "reverse_kl",
    row_weights: Tensor | None = None,
    labels: Tensor | None = None,
    jsd_beta: float = 0.5,
) -> Tensor:
    """Returns the sum over rows of weight x divergence: a float32 scalar, equal on all ranks of the tp group.

    Pass only the supervised rows; the others then cost nothing. Gradients flow to the student's hidden states and head
    if they require them. The gradient of the hidden states is *complete* on every rank of the tp group (already summed
    over the shards; do not reduce it again); that of the head is this shard's own.

    Args:
        student, teacher: each model's hidden states `[n, H]`, the same on all ranks of the tp group, and this rank's
            rows of its output layer, `[V_padded / tp, H]`. The models' H may differ.
        vocabulary: the real ids, the temperature of both models, and the tp group.
        divergence: "reverse_kl" KL(p || q) (TIP Eq. 1, TA-OPD Eq. 6); "forward_kl" KL(q || p); "jsd" the generalised
            Jensen-Shannon divergence beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, with
            forward KL at beta 0 and reverse KL at beta 1; "sampled_token" log p(y) - log q(y) of the label y
            (TA-OPD after Eq. 6), with the gradient (log p(y) - log q(y)) d log p(y). For y drawn from p at this
            temperature, its mean is the gradient of the reverse KL. Plain differentiation would give d log p(y), whose
            mean is zero.
        row_weights: `[n]` float32 without gradient; `None`: all 1.
        labels: `[n]` int64 in [0, vocab_size), for "sampled_token".
        jsd_beta: in [0, 1].

    Memory: two logit chunks (float32; with Triton's kernels a bfloat16 head's are bfloat16 alone), the head's gradient
    in float32, and `[n, H]`; no `[n, V]` values are kept. The backward pass only scales the gradients, has no
    collective, and can run once.

    Raises:
        InputError: arguments do not match (before the first collective), or logits are not finite.
    """
    if divergence not in DIVERGENCES:
        raise InputError(f"divergence_loss: expected divergence in {', '.join(DIVERGENCES)}, got {divergence!r}.")
    if not 0 <= jsd_beta <= 1:
        raise InputError(f"divergence_loss: expected jsd_beta in [0, 1], got {jsd_beta}.")
    if divergence == "sampled_token" and labels is None:
        raise InputError("divergence_loss: expected labels for divergence 'sampled_token', got None.")
    inputs = checked_inputs("divergence_loss", (student, teacher), vocabulary, labels=labels, row_weights=row_weights)
    return weighted_sum(inputs, student, row_weights, _row_function(divergence, labels, jsd_beta))


def _row_function(divergence: str, labels: Tensor | None, jsd_beta: float) -> RowFunction:
    if divergence == "sampled_token":
        assert labels is not None, "checked on entry"
        return lambda chunk: row_functions.sampled_token(chunk, labels[chunk.rows])
    if divergence == "jsd" and 0 < jsd_beta < 1:
        return lambda chunk: row_functions.jsd(chunk, beta=jsd_beta)
    # At beta 0 and 1, the generalised JSD stands for its limit after division by the vanishing weight.
    is_reverse = divergence == "reverse_kl" or (divergence == "jsd" and jsd_beta == 1)
    return row_functions.reverse_kl if is_reverse else row_functions.forward_kl
