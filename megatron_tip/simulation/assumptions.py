"""What a simulated step assumes where the product reads values: rollouts, statistics, and the selection among them.

Beside these, `tensors.SimulatedTensors` makes up single numbers, `world.SimulatedGroup` floats that others send (1.0),
and `rank` a GPU's memory (0), because the plan itself decides which batches take one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.records import Numbers, Rollout, TokenIndex, TokenSelection
from megatron_tip.selection import Selector
from megatron_tip.selection.replicas import Replicas
from megatron_tip.statistics import STATISTICS, TokenStatistics

TYPICAL_SHARES = (0.1, 0.7)
"""The shortest and the longest response of a typical batch, as shares of rollout.max_response_tokens."""

STEP = 1
"""The step that is simulated: the seed of random draws."""


def assumed_rollouts(config: Config, *, longest: bool, count: int | None = None) -> list[Rollout]:
    """Returns a step's rollouts, or `count`: all of the longest length, or a typical batch.

    In a typical batch, responses are evenly spread between `TYPICAL_SHARES` of the longest (40 % on average), and
    prompts have half of their longest length. Tokens that an environment would add count as generated ones.
    """
    rollout, most = config.rollout, config.rollout.max_response_tokens
    count = count or rollout.prompts_per_step * rollout.samples_per_prompt
    student, teacher = config.prompts.max_prompt_tokens, config.prompts.longest_teacher_prompt
    prompts = [tokens if longest else max(1, tokens // 2) for tokens in (student, teacher)]
    low, high = TYPICAL_SHARES
    found = []
    for place in range(count):
        share = 1.0 if longest else low + (high - low) * (place * 7919 % count + 0.5) / count
        response = max(1, round(share * most))
        teachers = _ones(prompts[1] if config.prompts.teacher_reads_another else 0)
        found.append(_rollout(place, rollout.samples_per_prompt, _ones(prompts[0]), teachers, response))
    return found


def _rollout(
    place: int, samples: int, prompt: Numbers[int], teacher_prompt: Numbers[int], num_response_tokens: int
) -> Rollout:
    return Rollout(
        prompt_index=place // samples,
        sample_index=place % samples,
        prompt_ids=prompt,
        response_ids=_ones(num_response_tokens),
        rollout_logprobs=Numbers(np.broadcast_to(np.float64(-1), num_response_tokens), float),
        finish_reason="stop",
        weight_version=STEP - 1,
        teacher_prompt_ids=teacher_prompt,
    )


def _ones(count: int) -> Numbers[int]:
    """Returns `count` ids that take no memory."""
    return Numbers(np.broadcast_to(np.int64(1), count), int)


class OwnReplica(Replicas):
    """The replicas of a selection that sees this replica's rows alone: it sends their messages and adds nothing."""

    def gather(self, tensor: Tensor) -> Tensor:
        super().gather(tensor)
        return tensor[None]


@dataclass(frozen=True)
class AssumedSelection:
    """The selection in a batch whose statistics are independent and uniform in [0, 1), the same on every rank.

    All rows of all replicas are known here: one process stands for the world. `starts`: of each replica's rows.
    `owners`: the context-parallel rank that holds each row; empty without context parallelism. `takes_one_pass`:
    whether the scoring forward pass is held for the training. `scored`: the batch of all rows. `trained`: the one that
    goes backward, cut to the selection unless there is one pass.
    """

    index: TokenIndex
    statistics: TokenStatistics
    starts: list[int]
    owners: Tensor
    selection: TokenSelection
    last_selected: Tensor
    takes_one_pass: bool
    scored: StepBatch
    trained: StepBatch

    @classmethod
    def of(cls, selector: Selector, batch: StepBatch, *, takes_one_pass: bool) -> "AssumedSelection":
        """Returns the selection by `selector` among all rows of `batch`."""
        # of copies, which do not keep all micro-batches: they are several times larger
        replicas = range(len(batch.plan))
        parts = [replace(batch).replica_index(replica) for replica in replicas]
        owners = [replace(batch).row_owners(replica) for replica in replicas] if batch.cp_size > 1 else []
        index = TokenIndex(
            torch.cat([part.rollout_index for part in parts]), torch.cat([part.position for part in parts])
        )
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part))
        statistics = _random_statistics(len(index), with_jsd="jsd" in selector.required_statistics)
        alone = replace(selector, compare=False)  # each replica's own selection tells what the comparison costs
        selection = alone.select(_needed(selector, statistics), index, step=STEP)
        mask = selection.selection_mask
        last_selected = torch.full((len(batch.rollouts),), -1, dtype=torch.int64)
        last_selected.scatter_reduce_(0, index.rollout_index[mask], index.position[mask], "amax")
        trained = batch if takes_one_pass else batch.cut_after(last_selected.tolist())
        whole = torch.cat(owners) if owners else torch.empty(0, dtype=torch.int64)
        return cls(index, statistics, starts, whole, selection, last_selected, takes_one_pass, batch, trained)

    def rows_of(self, replica: int) -> slice:
        return slice(self.starts[replica], self.starts[replica + 1])

    def places_of(self, rank: int) -> Tensor:
        """Returns where the rows of a rank stand among all. `rank`: its place in dp x cp."""
        replica, cp_rank = divmod(rank, self.scored.cp_size)
        rows = self.rows_of(replica)
        places = torch.arange(rows.start, rows.stop)
        return places[self.owners[rows] == cp_rank] if len(self.owners) else places

    def statistics_of(self, rank: int, num_rows: Sequence[int]) -> list[TokenStatistics]:
        """Returns the statistics of a rank's parts of micro-batches, which have these numbers of rows."""
        places = self.places_of(rank)
        assert sum(num_rows) == len(places), "the numbers of rows are those of the scored batch"
        parts = places.split(list(num_rows))
        return [_map(self.statistics, lambda values, part=part: values[part]) for part in parts]

    def selection_of(self, replica: int) -> TokenSelection:
        """Returns a replica's part of the selection."""
        whole, rows = self.selection, self.rows_of(replica)
        scores = None if whole.scores is None else whole.scores[rows].clone()
        mask, weights = whole.selection_mask[rows].clone(), whole.row_weights[rows].clone()
        terms = {name: own[rows].clone() for name, own in whole.term_weights.items()}
        return replace(whole, selection_mask=mask, row_weights=weights, scores=scores, term_weights=terms)

    def arrivals(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns what `SelectedRows.sent_to` receives on a rank: counts `[dp x cp]`, places `[k, 2]` in its order."""
        counts, places = [], []
        for source in range((len(self.starts) - 1) * self.scored.cp_size):
            own = self.places_of(source)
            arriving = own[self._destinations[own] == rank]
            counts.append(len(arriving))
            places.append(torch.stack([self.index.rollout_index[arriving], self.index.position[arriving]], dim=1))
        return torch.tensor(counts), torch.cat(places)

    @cached_property
    def _destinations(self) -> Tensor:
        """The rank that trains each selected row; -1: not selected."""
        mask = self.selection.selection_mask
        chosen = TokenIndex(self.index.rollout_index[mask], self.index.position[mask])
        destinations = torch.full((len(mask),), -1)
        destinations[mask] = self.trained.ranks_of(chosen)
        return destinations


def _needed(selector: Selector, statistics: TokenStatistics) -> TokenStatistics | None:
    return statistics if selector.required_statistics else None


def _random_statistics(num_rows: int, *, with_jsd: bool) -> TokenStatistics:
    generator = torch.Generator().manual_seed(0)
    names = [name for name, one in STATISTICS.items() if one.needs != "top_k_alone" and (with_jsd or name != "jsd")]
    values: dict[str, Any] = {name: torch.rand(num_rows, generator=generator) for name in names}
    return TokenStatistics(**values)


def _map(statistics: TokenStatistics, function: Any) -> TokenStatistics:
    found = {one.name: getattr(statistics, one.name) for one in fields(TokenStatistics)}
    values: dict[str, Any] = {name: None if value is None else function(value) for name, value in found.items()}
    return TokenStatistics(**values)
