"""Ratios of student and engine, and the truncated weights made from them."""

import math
from dataclasses import MISSING

import torch

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.records import Rollout, TokenSelection
from megatron_tip.statistics import TokenStatistics
from megatron_tip.training.importance import log_ratios, with_importance
from megatron_tip.training.step_metrics import rollout_metrics


def rollout(index, logprobs, version=0):
    ids = tuple(range(5, 5 + len(logprobs)))
    return Rollout(index, 0, (1, 2), ids, tuple(logprobs), "length", version)


def statistics_of(logprobs):
    nothing = torch.zeros(len(logprobs))
    names = [name for name, field in TokenStatistics.__dataclass_fields__.items() if field.default is MISSING]
    return TokenStatistics(**dict.fromkeys(names, nothing), student_logprobs=torch.tensor(logprobs))


def test_each_row_is_compared_with_its_own_token():
    rollouts = [rollout(0, [-1.0, -2.0]), rollout(1, []), rollout(2, [-3.0, -4.0, -5.0])]
    batch = StepBatch.over(
        rollouts, dp_size=1, max_tokens=64, pad_token_id=0, token_multiple=1, device=torch.device("cpu")
    )
    index = batch.token_index(0)
    own = [rollouts[r].rollout_logprobs[p] for r, p in zip(index.rollout_index, index.position, strict=True)]
    ratios = log_ratios(batch, 0, statistics_of([value + 0.25 for value in own]))
    torch.testing.assert_close(ratios, torch.full((5,), 0.25))


def test_weights_are_multiplied_by_the_ratio_up_to_the_cap():
    mask, own = torch.tensor([True, True, False]), torch.tensor([0.5, 0.5, 0.0])
    selection = TokenSelection(mask, own, 3, 2, {}, term_weights={"forward_kl": 2 * own})
    weighted = with_importance(selection, torch.tensor([math.log(1.5), math.log(9.0), 0.0]), cap=2.0)
    torch.testing.assert_close(weighted.row_weights, torch.tensor([0.75, 1.0, 0.0]))
    torch.testing.assert_close(weighted.term_weights["forward_kl"], torch.tensor([1.5, 2.0, 0.0]))
    assert weighted.num_selected == 2


def test_staleness_is_counted_in_steps_and_one_step_is_allowed_ahead():
    rollouts = [rollout(0, [-1.0], version=4), rollout(1, [-1.0], version=5)]
    assert rollout_metrics(rollouts, weight_version=5)["rollout/num_stale"] == 1
    metrics = rollout_metrics(rollouts, weight_version=5, ahead=1)
    assert metrics["rollout/num_stale"] == 0
    assert metrics["rollout/staleness_steps"] == 0.5
    assert rollout_metrics(rollouts, weight_version=4, ahead=1)["rollout/num_stale"] == 1  # of the future
