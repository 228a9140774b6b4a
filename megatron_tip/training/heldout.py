"""KL(student || teacher) on responses to held-out prompts, which are never trained on, and the responses' scores."""

from collections.abc import Sequence

import torch.distributed as dist

from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.records import Rollout
from megatron_tip.training.rollouts import heldout_rollouts
from megatron_tip.training.run import TrainingRun


def measure_heldout(run: TrainingRun, step: int) -> tuple[float, list[Rollout]]:
    """Returns the mean `heldout_statistic` per response token after `step` steps, and the responses.

    The mean is in nats: the reverse KL over the full vocabulary or, for a teacher behind servers, its lower bound
    `topk_reverse_kl`. It is NaN if no response has a token.

    Both are equal on every rank. Every call uses the same sampling seed, so two calls differ only by the student.
    Collective over the world.
    """
    rollouts = heldout_rollouts(run, step)
    batch = run.batch_of(rollouts)
    if not batch.num_valid():
        return float("nan"), rollouts
    run.enter("measure")
    statistics, _ = run.teacher.score(run.student, batch, run.teacher.ask(batch))
    groups = run.student.groups
    total = 0.0
    if statistics is not None:
        value = getattr(statistics, run.teacher.heldout_statistic).double().sum()
        dist.all_reduce(value, group=groups.dp_cp_group)
        total = value.item()
    reporter = groups.grid.rank_at(tp=0, dp=0, pp=groups.grid.pp_size - 1)
    return broadcast_json(total, source=reporter, device=run.device) / batch.num_valid(), rollouts


def verify_heldout(run: TrainingRun, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns how many answers are right, as metrics, the same on every rank; none if they are not asked.

    Collective over the world if heldout.verify asks for them.
    """
    if run.config.heldout.verify == "no":
        return {}
    return run.on_source(lambda source: source.verifier.metrics(rollouts) if source.verifier else {})
