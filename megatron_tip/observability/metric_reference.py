"""What each metric of metrics.jsonl means. The documentation's page of metrics is written from it."""

import re
from dataclasses import dataclass

from megatron_tip.statistics import STATISTICS


@dataclass(frozen=True)
class Metric:
    """A metric, or a family of them with `<placeholder>` in `name`. `unit`: empty for counts."""

    name: str
    unit: str
    meaning: str

    def is_named(self, name: str) -> bool:
        """Returns whether `name` is this metric or one of its family."""
        pattern = re.sub(r"<\w+>", "[a-z0-9_]+", self.name)
        return re.fullmatch(pattern, name) is not None


def metric_of(name: str) -> Metric | None:
    """Returns the entry of METRICS for a metric's name; exact names come before families."""
    return next((metric for metric in sorted(METRICS, key=lambda one: "<" in one.name) if metric.is_named(name)), None)


_MEANS = tuple(
    Metric(f"train/{name}", one.unit, f"{one.meaning}, mean over all valid tokens of the batch")
    for name, one in STATISTICS.items()
    if one.logged
)

# fmt: off
METRICS = (
    Metric("train/loss", "nats", "the loss: mean over the selected tokens, with the rule's weights"),
    *_MEANS,
    Metric("train/grad_norm", "", "norm of the whole gradient before clipping"),
    Metric("train/lr", "", "learning rate of the step"),
    Metric("train/num_model_tokens", "tokens", "prompt and response tokens of the training pass, after the cut"),
    Metric("train/num_model_tokens_uncut", "tokens", "the same before the cut after each last selected token"),
    Metric("train/num_teacher_tokens", "tokens", "prompt and response tokens that the teacher reads"),
    Metric("train/num_micro_batches", "", "micro-batches of the training pass, all replicas"),
    Metric("train/num_micro_batches_uncut", "", "micro-batches before the cut, all replicas"),
    Metric("train/saved_token_share", "share", "tokens that the cut left out, of those before it"),
    Metric("train/padding_token_share", "share", "padding, of all positions of the training pass"),
    Metric("train/one_pass", "0 or 1", "whether the step selected from one forward pass (selection.passes)"),
    Metric("train/skipped_not_finite", "0 or 1", "whether the update was left out: a gradient was not finite"),
    Metric("train/skipped_no_valid_token", "0 or 1", "whether the update was left out: no response had a token"),

    Metric("selection/num_valid", "tokens", "response tokens that could be selected, whole batch"),
    Metric("selection/num_selected", "tokens", "tokens that were"),
    Metric("selection/retention_ratio", "share", "selected, of the valid"),
    Metric("selection/threshold", "score's", "lowest kept score"),
    Metric("selection/tied_share", "share", "kept tokens that the order of ties decided on"),
    Metric("selection/median_<statistic>", "its own", "median over the valid tokens; \"high\" is above it"),
    Metric("selection/kept_<statistic>_mean", "its own", "mean over the selected tokens"),
    Metric("selection/dropped_<statistic>_mean", "its own", "mean over the others"),
    Metric("selection/q1_share", "share", "valid tokens of high entropy and high divergence (TIP's quadrants)"),
    Metric("selection/q2_share", "share", "of high entropy and low divergence"),
    Metric("selection/q3_share", "share", "of low entropy and high divergence: confident mistakes"),
    Metric("selection/q4_share", "share", "of low entropy and low divergence"),
    Metric("selection/kept_<quadrant>_share", "share", "a quadrant's share of the selected tokens"),
    Metric("selection/retention_position_<tenth>", "share", "selected, of a tenth (0 to 9) of the longest response"),
    Metric("selection/jaccard_<rule>", "share", "tokens that both rules would select, of those that either would"),

    Metric("rollout/num_rollouts", "", "responses of the step"),
    Metric("rollout/num_empty", "", "responses without a generated token"),
    Metric("rollout/num_stale", "", "responses of weights older than rollout.ahead allows"),
    Metric("rollout/staleness_steps", "steps", "mean age of the weights that generated"),
    Metric("rollout/response_tokens", "tokens", "generated tokens of the step"),
    Metric("rollout/response_tokens_mean", "tokens", "generated tokens per response"),
    Metric("rollout/truncated_ratio", "share", "responses that did not end with a stop id"),
    Metric("rollout/turns_mean", "", "turns of the student per response"),
    Metric("rollout/environment_tokens", "tokens", "tokens that environments wrote"),
    Metric("rollout/logprob_gap", "nats", "mean |ln p_student - ln p_rollout| of the sampled tokens"),
    Metric("rollout/importance_ratio", "", "mean p_student / p_rollout of the sampled tokens, before the cap"),
    Metric("rollout/generate_seconds", "s", "time in which servers generated; with rollout.ahead it overlaps the step"),
    Metric("rollout/num_repeated", "", "requests sent again after a failure"),
    Metric("rollout/num_wrong_version", "", "responses of a server with other weights than asked for"),
    Metric("rollout/num_set_aside", "", "requests given up after repeated failures"),
    Metric("rollout/num_dropped", "", "requests left out of the step"),

    Metric("sync/seconds", "s", "duration of a weight sync to the servers"),
    Metric("sync/bytes", "bytes", "weights sent in a sync"),
    Metric("sync/num_servers", "", "servers that took the weights"),
    Metric("sync/probe_gap", "nats", "largest logprob difference between trainer and server after a sync"),
    Metric("servers/num_up", "", "rollout servers that answer"),
    Metric("servers/num_lost", "", "times that a server was lost, since the command began"),
    Metric("servers/num_restarts", "", "times that the run started one of its own servers again"),

    Metric("diagnostics/forward_kl", "nats", "mean forward KL over the context bank"),
    Metric("diagnostics/gain", "nats", "how far that fell since step 0 (TA-OPD Eq. 1)"),
    Metric("diagnostics/gain_relative", "share", "the gain, of the value at step 0"),
    Metric("heldout/reverse_kl", "nats", "mean reverse KL per token of responses to held-out prompts"),
    Metric("heldout/topk_reverse_kl", "nats", "the same over the teacher's top-K, of a teacher that gives no more"),
    Metric("heldout/task_accuracy", "share", "held-out questions with the right answer, as heldout.verify finds it"),
    Metric("heldout/task_score", "", "mean score of held-out answers, 0 to 1; of a file's prompts it is the accuracy"),
    Metric("prompts/num_skipped", "", "distinct prompts longer than prompts.max_prompt_tokens"),
    Metric("prompts/num_copies", "", "rows that repeat another row"),
    Metric("prompts/num_duplicates", "", "training rows left out because their text is held out"),

    Metric("time/<phase>_seconds", "s", "wall clock of a phase on rank 0"),
    Metric("memory/<phase>_bytes", "bytes", "of rank 0: on a GPU its peak, on a CPU what is resident at its end"),
    Metric("perf/<phase>_tokens_per_second", "tokens/s", "all replicas together"),
    Metric("perf/<phase>_tflops_per_rank", "TFLOP/s", "model FLOPs of a worker; recomputation is not counted"),
    Metric("perf/<phase>_mfu", "share", "of the device's peak in bfloat16 (monitoring.peak_tflops)"),
    Metric("perf/saved_train_seconds", "s", "estimate of what the cut saved"),
    Metric("gpu/memory_used_max_bytes", "bytes", "largest of the step and of all workers, as NVML counts"),
    Metric("gpu/temperature_max_celsius", "°C", "largest of the step and of all workers"),
    Metric("gpu/utilisation_mean_percent", "%", "mean over the step and all workers"),
    Metric("gpu/power_total_watts", "W", "mean over the step, summed over workers"),
    Metric("gpu/throttled_ranks", "", "workers whose GPU was slowed by heat or power"),
    Metric("gpu/nvlink_errors", "", "since the driver was loaded, all workers"),
    Metric("host/cpu_mean_percent", "%", "mean over the step and all workers"),
    Metric("host/rss_total_bytes", "bytes", "resident memory of all workers, largest of the step"),
    Metric("host/memory_available_min_bytes", "bytes", "least that a host had left"),
)
"""Every metric of a training run, by area."""
# fmt: on
