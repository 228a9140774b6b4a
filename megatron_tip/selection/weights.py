"""Row weights, one function each: from places, normalised statistics `[n]` float64 and a rule's constants.

Letters: p student, q teacher; `h_p`, `h_q` their entropies; `log_p`, `log_q` their logprobs of the sampled token y.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.errors import InputError
from megatron_tip.selection.places import Places
from megatron_tip.selection.rule import Input, Rule, Weight


def teacher_is_uncertain(places: Places, h_q: Tensor, *, entropy: float, coefficient: float) -> Tensor:
    """Returns coefficient x 1[H(q) > entropy]: the gate of EOPD's forward KL. arXiv:2603.07079."""
    return torch.where(h_q > entropy, coefficient, 0.0)


def undrifted(places: Places, log_p: Tensor, log_q: Tensor, *, strength: float) -> Tensor:
    """Returns 1 + strength (1 - F_{t-1}): IW-OPD, arXiv:2606.22600.

    F_t is the share of the rollout's sum of |d| that its first t tokens have, d = ln p(y) - ln q(y); 0 if d is 0.
    """
    d = (log_p - log_q).abs()
    rollouts = places.rollouts
    before, total = rollouts.running_sum(d) - d, rollouts.total(d)[rollouts.group]
    return 1 + strength * (1 - torch.where(total > 0, before / total, 0.0))


def growing_prefix(places: Places, *, start: float, rest: float, progress: float) -> Tensor:
    """Returns 1 for the first ceil(r L) tokens of a rollout of L, and `rest` for the others.

    r rises from `start` at the first step to 1 at the last, along a cosine.
    """
    r = start + (1 - start) * (1 - math.cos(math.pi * progress)) / 2
    rollouts = places.rollouts
    return torch.where(rollouts.rank < (r * rollouts.sizes.double()).ceil()[rollouts.group], 1.0, rest).double()


def first_segment(places: Places, *, tokens: float) -> Tensor:
    """Returns 1 for the first `tokens` generated tokens of each rollout, else 0. arXiv:2602.15260."""
    return (places.rollouts.rank < tokens).double()


def accepted(places: Places, choice_rank: Tensor, *, top: float, rejected: float) -> Tensor:
    """Returns 1 if the student's first choice is among the teacher's `top`, else `rejected`: SelecTKD's greedy Top-k.

    arXiv:2510.24021. `choice_rank`: 0-based place of that choice among the teacher's.
    """
    return torch.where(choice_rank < top, 1.0, rejected).double()


def student_less_certain(places: Places, h_p: Tensor, h_q: Tensor) -> Tensor:
    """Returns sigmoid(H(p) - H(q)): TSD-KD's gate of the JSD. arXiv:2603.13260."""
    return torch.sigmoid(h_p - h_q)


def confident_teacher(places: Places, h_q: Tensor, h_p: Tensor) -> Tensor:
    """Returns (2 - H(q)/max)(1 + H(p)/max): FiRe's reweighting; both maxima over the batch. arXiv:2606.02684."""
    return (2 - h_q) * (1 + h_p)


def aligned_turn(places: Places, log_p: Tensor, log_q: Tensor, *, cap: float, epsilon: float) -> Tensor:
    """Returns min((d_1 + epsilon) / (d_k + epsilon), cap) for the tokens of turn k: SOD, arXiv:2605.07725.

    d_k is the mean of |ln p(y) - ln q(y)| over the turn's generated tokens.
    """
    d = places.turns.mean((log_p - log_q).abs())
    return ((d[places.first_turn] + epsilon) / (d[places.turns.group] + epsilon)).clamp(max=cap)


@dataclass(frozen=True)
class RowFactors:
    """What a rule multiplies the rows' losses by. `main`: `[n]` float64; `terms`: the same by divergence."""

    main: Tensor
    terms: dict[str, Tensor]

    def is_positive(self) -> Tensor:
        """Returns `[n]` bool: some part of the row's loss counts."""
        return torch.stack([self.main, *self.terms.values()]).gt(0).any(0)

    def is_bad(self) -> Tensor:
        """Returns `[n]` bool: a factor is negative or not finite."""
        factors = torch.stack([self.main, *self.terms.values()])
        return ((factors < 0) | ~factors.isfinite()).any(0)


def row_factors(rule: Rule, places: Places, inputs: Mapping[Input, Tensor], progress: float) -> RowFactors | None:
    """Returns the factors of this replica's rows, None for a rule without weights and terms; no communication.

    Args:
        progress: of the training, 0 at its first step and 1 at its last.

    Raises:
        InputError: a weight function does not return one number per row.
    """
    if not rule.weights:
        return None

    def of(weight: Weight) -> Tensor:
        schedule = {"progress": progress} if weight.follows_training else {}
        values = weight.function(places, *(inputs[item] for item in weight.inputs), **weight.constants, **schedule)
        if not isinstance(values, Tensor) or values.shape != places.index.position.shape:
            raise InputError(f"rule {rule.name!r}: expected weights of shape {tuple(places.index.position.shape)}")
        return values.to(torch.float64)

    ones = torch.ones(len(places.index), dtype=torch.float64, device=places.index.position.device)
    return RowFactors(of(rule.weight) if rule.weight else ones, {t.divergence: of(t.weight) for t in rule.terms})
