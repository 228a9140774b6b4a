"""The mismatch between the engine's and the student's distributions, and the weights that correct it."""

from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.records import TokenSelection
from megatron_tip.statistics import TokenStatistics


def comparable_ratios(
    config: Config, batch: StepBatch, replica: int, statistics: TokenStatistics | None
) -> Tensor | None:
    """Returns `log_ratios` where student and engine can be compared: at one temperature, uncut, with statistics."""
    rollout = config.rollout
    if statistics is None or (rollout.temperature, rollout.top_p) != (config.loss.temperature, 1.0):
        return None
    return log_ratios(batch, replica, statistics)


def log_ratios(batch: StepBatch, replica: int, statistics: TokenStatistics) -> Tensor:
    """Returns ln p_student(y) - ln p_rollout(y) for each row of the replica: `[n]` float32, on the last stage.

    Both must be at the same temperature; the plan rejects importance weights otherwise.
    """
    assert statistics.student_logprobs is not None, "the step scores with labels"
    index = batch.token_index(replica)
    lengths = [len(rollout.rollout_logprobs) for rollout in batch.rollouts]
    starts = torch.tensor(list(accumulate(lengths, initial=0))[:-1], dtype=torch.int64, device=index.position.device)
    logprobs = np.concatenate([rollout.rollout_logprobs.array for rollout in batch.rollouts])
    flat = torch.from_numpy(logprobs).to(index.position.device, torch.float32)
    return statistics.student_logprobs - flat[starts[index.rollout_index] + index.position]


def with_importance(selection: TokenSelection, ratios: Tensor, cap: float) -> TokenSelection:
    """Returns the selection with its weights multiplied by min(exp(`ratios`), `cap`): truncated importance sampling."""
    weights = ratios.exp().clamp(max=cap)
    terms = {name: own * weights for name, own in selection.term_weights.items()}
    return replace(selection, row_weights=selection.row_weights * weights, term_weights=terms)
