"""One or two forward passes of the student per step: which batches take only one."""

import sys
from dataclasses import dataclass

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.planning.memory_estimate import estimate_memory, may_take_one_pass
from megatron_tip.planning.plan import Outline

_BACKWARD_COST = 2
"""The cost of a backward pass in forward passes."""


@dataclass(frozen=True)
class OnePass:
    """The batches whose scoring forward pass is held, so that the training only goes backward.

    A batch alone decides, not what memory is free, so that all ranks and a resumed run take the same way.

    `max_tokens`: of the fullest replica, with padding; 0: no batch. `max_cut_share`: of the batch's tokens, those that
    two passes are expected to cut. `asked_share`: of the tokens, that is selected, `of_whole_rollouts` or of single
    tokens.
    """

    max_tokens: int
    max_cut_share: float
    asked_share: float
    of_whole_rollouts: bool = False

    def suits(self, batch: StepBatch) -> bool:
        """Returns whether `batch` is to be scored and trained with one forward pass; the same on every rank."""
        is_small = max(batch.num_padded_tokens()) <= self.max_tokens
        cut = 1 - self.asked_share if self.of_whole_rollouts else expected_cut_share(batch, self.asked_share)
        return is_small and cut <= self.max_cut_share

    def __str__(self) -> str:
        if self.max_tokens == 0:
            return "two forward passes of the student in a step that scores its tokens"
        if self.max_tokens == sys.maxsize:
            return "one forward pass of the student per step"
        return (
            f"one forward pass of the student in a step with at most {self.max_tokens:,} tokens per replica of which "
            f"at most {self.max_cut_share:.0%} are expected to be cut, else two"
        )


def plan_passes(config: Config, outline: Outline, *, memory_gib: float, on_gpu: bool) -> OnePass:
    """Returns which batches of the run take one pass.

    With "auto" they are those that fit, and for which a second forward pass costs more than it saves: the second pass
    costs one forward pass of the whole batch, and the cut saves its share of the training pass, which costs three, or
    four with recomputation.

    Args:
        memory_gib: of each rank's device, the same on every rank.
        on_gpu: whether the device is a GPU.
    """
    selector = outline.selector
    share, of_whole_rollouts = selector.asked_share, selector.resolved_scope == "whole_rollouts"
    if not may_take_one_pass(config, selector):
        return OnePass(0, 0.0, share)
    if config.selection.passes == "one":
        return OnePass(sys.maxsize, 1.0, share)
    fitting = estimate_memory(config, outline, gpu_memory_gib=memory_gib, on_gpu=on_gpu).held_tokens
    training_cost = 1 + _BACKWARD_COST + config.model.recompute_activations
    return OnePass(fitting, 1 / training_cost, share, of_whole_rollouts)


def expected_cut_share(batch: StepBatch, asked_share: float) -> float:
    """Returns the share of the batch's tokens that follow the last selected token of their sequence.

    Selected independently, each with probability rho, 1 / rho tokens do on average, or the whole response.
    """
    after_last = 1 / asked_share
    cut = sum(min(after_last, len(rollout.response_ids)) for rollout in batch.rollouts)
    return cut / batch.num_model_tokens()
