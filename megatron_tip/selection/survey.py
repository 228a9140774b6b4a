"""What all replicas must agree on before anything is selected: sizes, and whether the rows can be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.errors import InputError, TrainingError
from megatron_tip.records import TokenIndex, TokenStatistics
from megatron_tip.selection.replicas import Replicas


@dataclass(frozen=True)
class Survey:
    """Facts of the whole batch, equal on all replicas.

    `num_valid`: rows. `num_budgeted`: sum of the replicas' own budgets. `num_rollouts`, `num_positions`: one more than
    the largest rollout index and position. `not_finite`: names of the statistics with a NaN or an infinity.
    """

    num_valid: int
    num_budgeted: int
    num_rollouts: int
    num_positions: int
    not_finite: frozenset[str]


def take_survey(
    index: TokenIndex, values: Mapping[str, Tensor], num_budgeted: int, required: Iterable[str], replicas: Replicas
) -> Survey:
    """Returns the facts of the batch. 1 all-gather of a few integers a replica.

    Args:
        values: `[n]` by name, the statistics that this replica has; the same names on all replicas.
        required: the names that the rule reads.

    Raises (alike on all replicas): InputError for an index that is negative or does not fit the statistics;
    TrainingError for a batch without rows or a required statistic that is not finite.
    """
    num_rows = len(index)
    fits = index.position.shape == (num_rows,) and all(value.shape == (num_rows,) for value in values.values())
    fits = fits and (num_rows == 0 or int(torch.minimum(index.rollout_index, index.position).min()) >= 0)
    largest = [int(part.max()) + 1 if num_rows and fits else 0 for part in (index.rollout_index, index.position)]
    broken = [not bool(torch.isfinite(value).all()) for value in values.values()]
    own = torch.tensor([num_rows, num_budgeted, int(fits), *largest, *broken], device=index.rollout_index.device)
    table = replicas.gather(own).cpu()
    rows, budgeted, fitting, rollouts, positions = table[:, :5].unbind(dim=1)
    misfits = (fitting == 0).nonzero().flatten().tolist()
    if misfits:
        raise InputError(
            f"token index of data-parallel replicas {misfits}: expected one rollout_index and one position, both >= 0, "
            "for each row of the statistics; build both from the same loss_mask"
        )
    any_broken = table[:, 5:].any(dim=0).tolist()
    survey = Survey(
        num_valid=int(rows.sum()),
        num_budgeted=int(budgeted.sum()),
        num_rollouts=int(rollouts.max()),
        num_positions=int(positions.max()),
        not_finite=frozenset(name for name, bad in zip(values, any_broken, strict=True) if bad),
    )
    if survey.num_valid == 0:
        raise TrainingError(
            "the rollout batch has no valid token: every loss_mask is empty on every replica; check that responses are "
            "not empty and that the filters on finish_reason leave something"
        )
    return survey


def values_of(statistics: TokenStatistics, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the statistics of these names that are not None, as float32."""
    found = {name: getattr(statistics, name) for name in sorted(names)}
    return {name: value.to(torch.float32) for name, value in found.items() if value is not None}
