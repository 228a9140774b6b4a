"""KL(student || teacher) on prompts that are never trained on, over the student's own responses."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.records import Rollout, TokenStatistics, TopKTokenStatistics
from megatron_tip.teachers.megatron import Teacher
from megatron_tip.training.rollouts import heldout_rollouts
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.scoring import ask_teacher, score_tokens


def measure_heldout(run: TrainingRun, step: int) -> tuple[float, list[Rollout]]:
    """Mean reverse KL in nats a response token after `step` steps, and the responses.

    Over the full vocabulary; of a teacher behind servers, its lower bound `topk_reverse_kl`.

    Equal on every rank. The sampling seed is the same at every call, so that two calls differ by the student alone.
    NaN where no response has a token. Collective over the world.
    """
    rollouts = heldout_rollouts(run, step)
    batch = run.batch_of(rollouts)
    if not batch.num_valid():
        return float("nan"), rollouts
    statistics = score_tokens(run, batch, ask_teacher(run, batch))
    groups = run.student.groups
    total = 0.0
    if statistics is not None:
        value = _divergence(statistics).double().sum()
        dist.all_reduce(value, group=groups.dp_group)
        total = value.item()
    reporter = groups.grid.rank_at(tp=0, dp=0, pp=groups.grid.pp_size - 1)
    return broadcast_json(total, source=reporter, device=run.device) / batch.num_valid(), rollouts


def heldout_metric(run: TrainingRun) -> str:
    """The name of what `measure_heldout` measures."""
    return "heldout/reverse_kl" if isinstance(run.teacher, Teacher) else "heldout/topk_reverse_kl"


def _divergence(statistics: TokenStatistics) -> Tensor:
    value = statistics.topk_reverse_kl if isinstance(statistics, TopKTokenStatistics) else statistics.reverse_kl
    assert value is not None, "every scoring pass computes it"
    return value
