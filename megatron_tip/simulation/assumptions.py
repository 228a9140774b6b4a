"""What a simulated step assumes where the product reads values: rollouts, statistics, and the selection among them.

Nothing else in this package makes up a value, except `tensors.SimulatedTensors` for single numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
    prompts have half of their longest length.
    """
    rollout, most = config.rollout, config.rollout.max_response_tokens
    count = count or rollout.prompts_per_step * rollout.samples_per_prompt
    prompt = config.prompts.max_prompt_tokens if longest else max(1, config.prompts.max_prompt_tokens // 2)
    low, high = TYPICAL_SHARES
    found = []
    for place in range(count):
        share = 1.0 if longest else low + (high - low) * (place * 7919 % count + 0.5) / count
        found.append(_rollout(place, rollout.samples_per_prompt, prompt, max(1, round(share * most))))
    return found


def _rollout(place: int, samples: int, num_prompt_tokens: int, num_response_tokens: int) -> Rollout:
    return Rollout(
        prompt_index=place // samples,
        sample_index=place % samples,
        prompt_ids=_ones(num_prompt_tokens),
        response_ids=_ones(num_response_tokens),
        rollout_logprobs=Numbers(np.broadcast_to(np.float64(-1), num_response_tokens), float),
        finish_reason="stop",
        weight_version=STEP - 1,
    )


def _ones(count: int) -> Numbers[int]:
    """Returns `count` ids that take no memory."""
    return Numbers(np.broadcast_to(np.int64(1), count), int)


class AlikeReplicas(Replicas):
    """Replicas that all hold the same rows: a sum is a multiple of this replica's part. Messages are sent."""

    def sum(self, tensor: Tensor) -> Tensor:
        num_replicas = 1 if self.group is None else self.group.size()
        return super().sum(tensor).mul_(num_replicas)


@dataclass(frozen=True)
class AssumedSelection:
    """The selection in a batch whose statistics are independent and uniform in [0, 1), the same on every rank.

    One process stands for the world, so each replica's part is known here; with such statistics a replica that selects
    among its own rows has nearly the thresholds of all. `takes_one_pass`: whether the scoring forward pass is held for
    the training. `trained`: the batch that goes backward, cut to the selection unless there is one pass.
    """

    indices: list[TokenIndex]
    statistics: list[TokenStatistics]
    selections: list[TokenSelection]
    last_selected: Tensor
    takes_one_pass: bool
    trained: StepBatch

    @classmethod
    def of(cls, selector: Selector, batch: StepBatch, *, takes_one_pass: bool) -> "AssumedSelection":
        """Returns the selections by `selector` among the rows of each replica of `batch`."""
        indices = [batch.token_index(replica) for replica in range(len(batch.plan))]
        with_jsd = "jsd" in selector.required_statistics
        statistics = [_random_statistics(len(index), with_jsd, replica) for replica, index in enumerate(indices)]
        parts = [
            selector.select(_needed(selector, own), index, step=STEP)
            for own, index in zip(statistics, indices, strict=True)
        ]
        total = {name: sum(getattr(part, name) for part in parts) for name in ("num_valid", "num_selected")}
        selections = [replace(part, **total) for part in parts]
        last_selected = torch.full((len(batch.rollouts),), -1, dtype=torch.int64)
        for index, part in zip(indices, selections, strict=True):
            mask = part.selection_mask
            last_selected.scatter_reduce_(0, index.rollout_index[mask], index.position[mask], "amax")
        trained = batch if takes_one_pass else batch.cut_after(last_selected.tolist())
        return cls(indices, statistics, selections, last_selected, takes_one_pass, trained)

    def statistics_of(self, replica: int, num_rows: Sequence[int]) -> list[TokenStatistics]:
        """Returns the statistics of a replica's micro-batches, which have these numbers of rows."""
        own, start, found = self.statistics[replica], 0, []
        assert sum(num_rows) == len(self.indices[replica]), "the numbers of rows are those of the scored batch"
        for count in num_rows:
            part = slice(start, start + count)
            found.append(_map(own, lambda values, part=part: values[part].clone()))
            start += count
        return found

    def arrivals(self, replica: int) -> tuple[Tensor, Tensor]:
        """Returns what `SelectedRows.sent_to` receives on a replica: counts `[dp]`, places `[k, 2]` in its order."""
        destinations = self.trained.replica_of()
        counts, places = [], []
        for index, part in zip(self.indices, self.selections, strict=True):
            mask = part.selection_mask
            sent = torch.stack([index.rollout_index[mask], index.position[mask]], dim=1)
            arriving = sent[destinations[sent[:, 0]] == replica]
            counts.append(len(arriving))
            places.append(arriving)
        return torch.tensor(counts), torch.cat(places)


def _needed(selector: Selector, statistics: TokenStatistics) -> TokenStatistics | None:
    return statistics if selector.required_statistics else None


def _random_statistics(num_rows: int, with_jsd: bool, seed: int) -> TokenStatistics:
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, one in STATISTICS.items() if one.needs != "top_k_alone" and (with_jsd or name != "jsd")]
    values: dict[str, Any] = {name: torch.rand(num_rows, generator=generator) for name in names}
    return TokenStatistics(**values)


def _map(statistics: TokenStatistics, function: Any) -> TokenStatistics:
    found = {one.name: getattr(statistics, one.name) for one in fields(TokenStatistics)}
    values: dict[str, Any] = {name: None if value is None else function(value) for name, value in found.items()}
    return TokenStatistics(**values)
