"""A sample of a step's tokens for a person to look at, brought from the last stage to the first process."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.observability.token_view import TokenView, ViewedResponse
from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import Rollout, TokenIndex, TokenSelection, TokenStatistics
from megatron_tip.selection.metrics import QUADRANT_DIVERGENCES
from megatron_tip.training.view_table import view_table


@dataclass
class TokenViews:
    """Takes a view of every `tracking.view_every_steps`-th step. `latest`: that of the last step, where one was taken,
    in the first process.
    """

    config: Config
    tokenizer: PreTrainedTokenizerBase
    groups: ModelGroups
    latest: TokenView | None = field(default=None, init=False)

    def is_due(self, step: int) -> bool:
        """Whether `step` is viewed; its tokens are then scored whatever the rule needs."""
        every = self.config.tracking.view_every_steps
        return every > 0 and step % every == 0

    def shows_support(self, step: int) -> bool:
        """Whether this rank's replica is to keep the top-K of its tokens for the view of `step`."""
        return self.is_due(step) and self.groups.dp_rank == 0

    def capture(
        self, step: int, batch: StepBatch, statistics: TokenStatistics | None, selection: TokenSelection | None
    ) -> None:
        """Takes the view of replica 0, if it is due at `step`. Collective over the world: `broadcast_json`.

        Args:
            batch: before the cut. statistics, selection: this replica's, on the last stage; None elsewhere.
        """
        self.latest = None
        if not self.is_due(step):
            return
        grid, settings = self.groups.grid, self.config.tracking
        reporter = grid.rank_at(tp=0, dp=0, pp=grid.pp_size - 1)
        rank = torch.distributed.get_rank()
        content = None
        if rank == reporter:
            assert selection is not None, "selections are made on the last stage"
            index = batch.token_index(0)
            samples, points = settings.view_samples, settings.view_points
            content = view_content(index, statistics, selection, num_samples=samples, num_points=points)
            table = view_table(content, index, statistics, selection, batch.rollouts, self.tokenizer, self.config, step)
            content["table"] = base64.b64encode(table).decode()
        content = broadcast_json(content, source=reporter, device=batch.device)
        if rank == 0:
            self.latest = view_of(content, batch.rollouts, self.tokenizer)


def view_content(
    index: TokenIndex,
    statistics: TokenStatistics | None,
    selection: TokenSelection,
    *,
    num_samples: int,
    num_points: int,
) -> dict[str, Any]:
    """Returns what a view holds, in numbers: some rollouts' positions, and points of the quadrants' scatter."""
    selected = selection.selection_mask
    kl = statistics.reverse_kl if statistics is not None else None
    responses = []
    for place in index.rollout_index.unique()[:num_samples].tolist():
        rows = index.rollout_index == place
        responses.append(
            {
                "rollout": place,
                "positions": index.position[rows].tolist(),
                "selected": selected[rows].tolist(),
                "reverse_kl": kl[rows].tolist() if kl is not None else [],
            }
        )
    axis = next((name for name in QUADRANT_DIVERGENCES if f"selection/median_{name}" in selection.metrics), "")
    points = []
    if statistics is not None and axis:
        stride = -(-len(statistics) // num_points)
        columns = (statistics.student_entropy, getattr(statistics, axis), selected)
        points = list(zip(*(column[::stride].tolist() for column in columns), strict=True))
    medians = [selection.metrics.get(f"selection/median_{name}") for name in ("student_entropy", axis)]
    return {"responses": responses, "points": points, "divergence": axis, "medians": medians}


def view_of(content: dict[str, Any], rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> TokenView:
    """Returns the view of `view_content` with the rollouts' texts."""
    responses = []
    for found in content["responses"]:
        rollout = rollouts[found["rollout"]]
        ids = rollout.response_ids
        selected, kl = [False] * len(ids), [0.0] * len(ids)
        for row, position in enumerate(found["positions"]):
            selected[position] = found["selected"][row]
            if found["reverse_kl"]:
                kl[position] = found["reverse_kl"][row]
        tokens = tuple(str(tokenizer.decode([token])) for token in ids)
        prompt = str(tokenizer.decode(list(rollout.prompt_ids)))
        responses.append(ViewedResponse(prompt, tokens, tuple(selected), tuple(kl) if found["reverse_kl"] else ()))
    entropy, divergence = content["medians"]
    return TokenView(
        responses=tuple(responses),
        points=tuple((x, y, kept) for x, y, kept in content["points"]),
        divergence=content["divergence"],
        medians=None if entropy is None or divergence is None else (entropy, divergence),
        table=base64.b64decode(content.get("table", "")),
    )
