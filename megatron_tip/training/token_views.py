"""Views: samples of a step's tokens for people to inspect, sent from the last stage to rank 0."""

from dataclasses import dataclass, field

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.observability.token_table import TokenTable, decode_token_table, encode_token_table
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.parallel.together import run_on
from megatron_tip.records import TokenSelection
from megatron_tip.statistics import TokenStatistics
from megatron_tip.training.context_rows import ContextRows
from megatron_tip.training.view_table import view_table


@dataclass
class TokenViews:
    """Views of every `tracking.view_every_steps`-th step.

    `latest`: the last step's view on rank 0; None elsewhere, and if that step has none.
    """

    config: Config
    tokenizer: PreTrainedTokenizerBase
    groups: ModelGroups
    latest: TokenTable | None = field(default=None, init=False)

    def is_due(self, step: int) -> bool:
        """Returns whether `step` has a view; its tokens are then scored even if the rule does not need it."""
        every = self.config.tracking.view_every_steps
        return every > 0 and step % every == 0

    def shows_support(self, step: int) -> bool:
        """Returns whether this rank's replica must keep the top-K of its tokens for the view of `step`."""
        return self.is_due(step) and self.groups.dp_rank == 0

    def capture(
        self, step: int, batch: StepBatch, statistics: TokenStatistics | None, selection: TokenSelection | None
    ) -> None:
        """Takes a view of replica 0 if one is due at `step`. Collective over the world, through `run_on`.

        Args:
            batch: the uncut batch.
            statistics, selection: of this rank's rows, on the last stage; None elsewhere.
        """
        self.latest = None
        if not self.is_due(step):
            return
        if self.groups.dp_rank == 0 and selection is not None:
            rows = ContextRows.of(batch, self.groups)
            statistics, selection = rows.whole_statistics(statistics), rows.whole_selection(selection)

        def view() -> TokenTable:
            assert selection is not None, "selections are made on the last stage"
            return view_table(
                batch.replica_index(0), statistics, selection, batch.rollouts, self.tokenizer, self.config, step
            )

        reporter = self.groups.grid.rank_at(tp=0, dp=0, pp=self.groups.grid.pp_size - 1)
        found = run_on(reporter, view, device=batch.device, encode=encode_token_table, decode=decode_token_table)
        if dist.get_rank() == 0:
            self.latest = found
