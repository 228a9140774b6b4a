"""KL(student || teacher) on prompts that are never trained on, over the student's own responses."""

import torch.distributed as dist

from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.records import Rollout
from megatron_tip.training.rollouts import heldout_rollouts
from megatron_tip.training.run import TrainingRun


def measure_heldout(run: TrainingRun, step: int) -> tuple[float, list[Rollout]]:
    """Returns the mean of the teacher's `heldout_statistic` per response token after `step` steps, and the responses.

    In nats: the reverse KL over the full vocabulary; with a teacher behind servers, its lower bound `topk_reverse_kl`.

    Equal on every rank. The sampling seed is the same at every call, so that two calls differ by the student alone.
    NaN where no response has a token. Collective over the world.
    """
    rollouts = heldout_rollouts(run, step)
    batch = run.batch_of(rollouts)
    if not batch.num_valid():
        return float("nan"), rollouts
    statistics, _ = run.teacher.score(run.student, batch, run.teacher.ask(batch))
    groups = run.student.groups
    total = 0.0
    if statistics is not None:
        value = getattr(statistics, run.teacher.heldout_statistic).double().sum()
        dist.all_reduce(value, group=groups.dp_group)
        total = value.item()
    reporter = groups.grid.rank_at(tp=0, dp=0, pp=groups.grid.pp_size - 1)
    return broadcast_json(total, source=reporter, device=run.device) / batch.num_valid(), rollouts
