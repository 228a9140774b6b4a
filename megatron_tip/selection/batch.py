"""The rollout batch as one replica sees it: its own rows, and the shared facts needed for selection."""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields

import torch
from torch import Tensor

from megatron_tip.errors import InputError, NotFiniteError, TrainingError
from megatron_tip.records import TokenIndex
from megatron_tip.selection.replicas import Replicas
from megatron_tip.statistics import TokenStatistics

MAX_KEY_BITS = 62
_ALWAYS_COMPUTED = frozenset(field.name for field in fields(TokenStatistics) if field.default is MISSING)


@dataclass(frozen=True)
class Batch:
    """This replica's rows, and facts about the whole batch that are equal on all replicas.

    `values`: `[n]` float32 by name, the statistics that are finite on every row of the batch. `num_valid`: rows of the
    batch. `num_budgeted`: sum of the replicas' own budgets. `num_positions`: the largest position plus one.
    """

    index: TokenIndex
    values: dict[str, Tensor]
    replicas: Replicas
    num_valid: int
    num_budgeted: int
    num_positions: int
    key_bits: int

    def token_order(self) -> Tensor:
        """Returns `[n]` int64 keys below 2^key_bits, distinct over the batch, by rollout, then by position."""
        return self.index.keys(self.num_positions)


def read_values(statistics: TokenStatistics | None, required: Collection[str] = ()) -> dict[str, Tensor]:
    """Returns the available `required` statistics, and those that every scoring pass computes, as float32.

    Leaves out optional ones that are not required, so that all replicas agree on the names and their order.
    """
    found = {name: getattr(statistics, name, None) for name in sorted(_ALWAYS_COMPUTED.union(required))}
    return {name: value.to(torch.float32) for name, value in found.items() if value is not None}


def read_batch(
    values: Mapping[str, Tensor],
    index: TokenIndex,
    replicas: Replicas,
    *,
    required: Collection[str] = (),
    rule_name: str = "",
    num_budgeted: int = 0,
) -> Batch:
    """Returns the batch from this replica's rows, `values` and `index`. 1 all-gather of a few integers.

    Args:
        values: `[n]` by name; the same names on all replicas.
        required: names that `rule_name` reads. num_budgeted: this replica's own budget, if it has one.

    Raises:
        InputError: an index is negative or does not match the statistics; on all replicas.
        TrainingError: the batch has no rows; on all replicas.
        NotFiniteError: a required statistic is not finite; on all replicas.
    """
    facts = replicas.gather(_own_facts(values, index, num_budgeted)).cpu()
    misfits = (facts[:, 0] == 0).nonzero().flatten().tolist()
    if misfits:
        raise InputError(
            f"token index of data-parallel replicas {misfits}: expected one rollout_index and one position, both >= 0, "
            "for each row of the statistics; build both from the same loss_mask"
        )
    num_valid, num_budgeted = facts[:, 1:3].sum(dim=0).tolist()
    num_rollouts, num_positions = facts[:, 3:5].amax(dim=0).tolist()
    not_finite = {name for name, bad in zip(values, facts[:, 5:].any(dim=0).tolist(), strict=True) if bad}
    if num_valid == 0:
        raise TrainingError(
            "the rollout batch has no valid token: every loss_mask is empty on every replica; check that responses are "
            "not empty and that the filters on finish_reason do not remove all of them"
        )
    if broken := sorted(not_finite.intersection(required)):
        raise NotFiniteError(
            f"rule {rule_name!r}: the statistics {broken} contain NaN or infinity, so logits of the student or the "
            "teacher are not finite"
        )
    key_bits = max(1, (num_rollouts * num_positions - 1).bit_length())
    if key_bits > MAX_KEY_BITS:
        raise InputError(
            f"token index: {num_rollouts} rollouts x {num_positions} positions do not fit {MAX_KEY_BITS} bits; number "
            "the rollouts of a step from 0"
        )
    return Batch(
        index=index,
        values={name: value for name, value in values.items() if name not in not_finite},
        replicas=replicas,
        num_valid=num_valid,
        num_budgeted=num_budgeted,
        num_positions=num_positions,
        key_bits=key_bits,
    )


def _own_facts(values: Mapping[str, Tensor], index: TokenIndex, num_budgeted: int) -> Tensor:
    """Returns int64: whether rows match, their number and budget, two index extents, one non-finite flag per value."""
    num_rows = len(index)
    fits = index.position.shape == (num_rows,) and all(value.shape == (num_rows,) for value in values.values())
    parts = (index.rollout_index, index.position)
    counts = torch.tensor([fits, num_rows, num_budgeted], dtype=torch.int64, device=index.position.device)
    extents = [part.max() + 1 if len(part) else counts.new_zeros(()) for part in parts]
    for part in parts:
        counts[0] *= (part >= 0).all()
    flaws = [(~torch.isfinite(value)).any().to(counts.device) for value in values.values()]
    return torch.cat([counts, torch.stack([*extents, *flaws]).to(torch.int64)])
