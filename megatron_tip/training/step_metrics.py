"""The metrics of a step, summed over the replicas and equal on every rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import Rollout
from megatron_tip.statistics import STATISTICS
from megatron_tip.training.supervision import Trained

MEANS = {f"train/{name}": name for name, statistic in STATISTICS.items() if statistic.logged}
"""Metric -> the statistic that it averages over all valid tokens of the batch."""


def rollout_metrics(rollouts: Sequence[Rollout], *, weight_version: int, ahead: int = 0) -> dict[str, float]:
    """Returns counts and lengths of a step's rollouts.

    A rollout is stale if it is not from the last `1 + ahead` weight versions, and truncated if it did not end with a
    stop id. Lengths count generated tokens.
    """
    ages = [weight_version - rollout.weight_version for rollout in rollouts]
    lengths = [rollout.num_generated for rollout in rollouts]
    count = max(1, len(rollouts))
    return {
        "rollout/num_rollouts": float(len(rollouts)),
        "rollout/num_empty": float(lengths.count(0)),
        "rollout/num_stale": float(sum(not 0 <= age <= ahead for age in ages)),
        "rollout/staleness_steps": sum(ages) / count,
        "rollout/response_tokens": float(sum(lengths)),
        "rollout/response_tokens_mean": sum(lengths) / count,
        "rollout/truncated_ratio": sum(rollout.finish_reason != "stop" for rollout in rollouts) / count,
        "rollout/turns_mean": sum(len(rollout.environment_spans) + 1 for rollout in rollouts) / count,
        "rollout/environment_tokens": float(sum(len(rollout.response_ids) for rollout in rollouts) - sum(lengths)),
    }


def supervision_metrics(groups: ModelGroups, trained: Trained, *, pass_seconds: float) -> dict[str, float]:
    """Returns loss, means over valid tokens and token counts of the whole batch, equal on every rank.

    Args:
        pass_seconds: the duration of this rank's training pass, forward and backward.

    Collectives: one all-reduce over dp x cp on the last stage, then `broadcast_json` over the world.
    """
    statistics, selection, ratios = trained.scored.statistics, trained.selection, trained.scored.ratios
    device = trained.batch.device
    metrics: dict[str, float] = {}
    if selection is not None:
        sums = {
            "train/loss": trained.loss,
            "rows": float(selection.selection_mask.shape[0]),
        }
        if statistics is not None:
            found = {name: getattr(statistics, field) for name, field in MEANS.items()}
            sums |= {name: value.double().sum().item() for name, value in found.items() if value is not None}
            if ratios is not None:
                sums["rollout/logprob_gap"] = ratios.double().abs().sum().item()
                sums["rollout/importance_ratio"] = ratios.double().exp().sum().item()
        totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
        dist.all_reduce(totals, group=groups.dp_cp_group)
        metrics = dict(zip(sums, totals.tolist(), strict=True))
        rows = metrics.pop("rows")
        means = (*MEANS, "rollout/logprob_gap", "rollout/importance_ratio")
        metrics |= {name: metrics[name] / rows for name in means if name in metrics}
        metrics |= saved_metrics(trained.scored.batch, trained.batch, pass_seconds)
        metrics["train/one_pass"] = float(trained.scored.held is not None)
        metrics["train/num_teacher_tokens"] = float(trained.scored.batch.num_teacher_tokens())
        metrics |= {
            "selection/num_valid": float(selection.num_valid),
            "selection/num_selected": float(selection.num_selected),
            "selection/retention_ratio": selection.retention_ratio,
            **selection.metrics,
        }
    reporter = groups.grid.rank_at(tp=0, dp=0, pp=groups.grid.pp_size - 1)
    return broadcast_json(metrics, source=reporter, device=device)


def saved_metrics(scored: StepBatch, trained: StepBatch, pass_seconds: float) -> dict[str, float]:
    """Returns how much the training pass saved by cutting responses after their last selected token.

    `train/saved_token_share` is a share of the uncut batch's tokens, `train/padding_token_share` that of padding in all
    that goes through the model. `perf/saved_train_seconds` is an estimate: it assumes time proportional to the tokens,
    with padding, of the replica with the most.
    """
    tokens, uncut = trained.num_model_tokens(), scored.num_model_tokens()
    padded = trained.num_padded_tokens()
    slowdown = max(scored.num_padded_tokens()) / max(padded)
    return {
        "train/num_model_tokens": float(tokens),
        "train/num_model_tokens_uncut": float(uncut),
        "train/num_micro_batches": float(trained.num_micro_batches()),
        "train/num_micro_batches_uncut": float(scored.num_micro_batches()),
        "train/saved_token_share": 1 - tokens / uncut,
        "train/padding_token_share": 1 - tokens / sum(padded),
        "perf/saved_train_seconds": pass_seconds * (slowdown - 1),
    }
