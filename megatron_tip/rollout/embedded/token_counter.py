"""A count of a batch's tokens while transformers' `generate` samples them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tip.rollout.progress_clock import ProgressClock


class TokenCounter:
    """A counter of the tokens of `num_rows` responses that are generated together; `num_before` are finished already.

    It counts on the device, and reads the count only when the clock shows it.
    """

    def __init__(
        self,
        clock: ProgressClock,
        num_before: int,
        num_rows: int,
        stop_token_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self._clock = clock
        self._num_before = num_before
        self._stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=device)
        self._is_open = torch.ones(num_rows, dtype=torch.bool, device=device)
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)

    def count(self, tokens: Tensor) -> None:
        """Counts the sampled `tokens`, `[b, 1]`, of the responses that have not ended."""
        self._num_tokens += self._is_open.sum()
        self._is_open &= ~torch.isin(tokens[:, 0], self._stops)
        if self._clock.is_due:
            num_finished = len(self._is_open) - int(self._is_open.sum())
            self._clock.note(self._num_before, int(self._num_tokens), self._num_before + num_finished)
