"""The sync of new weights to the engine, and its verification."""

import logging
from functools import partial

import torch

from megatron_tip.config import Config
from megatron_tip.conversion.bridge import export_hf
from megatron_tip.errors import EngineError
from megatron_tip.parallel.stop import StopSignals
from megatron_tip.parallel.together import together
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.training.probe import probe_ids, probe_logprobs
from megatron_tip.training.run import RolloutSource, TrainingRun

logger = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-4
REDUCED_TOLERANCE = 0.05
"""Default limits of the mean absolute difference of a probe's logprobs, in nats. REDUCED_TOLERANCE is for bfloat16."""


def update_engine(run: TrainingRun, *, weight_version: int, first: bool = False) -> dict[str, float]:
    """Syncs the student's weights to the engine, once it has finished the batch that it generates ahead.

    Returns the metrics of engine and sync, equal on every rank. Collective over the world. For arguments and further
    errors see `sync_engine`.

    Raises:
        StopRequested: rank 0 received a stop signal while it waited for that batch; raised on every rank.
    """
    if run.config.rollout.ahead:
        with run.timer.phase("rollout"):
            run.on_source(partial(_wait, stop=run.stop))
    with run.timer.phase("sync"):
        metrics = sync_engine(run, weight_version=weight_version, first=first)
    batch_name = run.sampling.for_step(weight_version).batch_name
    return metrics | run.on_source(lambda source: source.engine.take_metrics(batch_name))


def _wait(source: RolloutSource, stop: StopSignals) -> None:
    with stop.interruptible():
        source.engine.wait()


def sync_engine(run: TrainingRun, *, weight_version: int, first: bool = False) -> dict[str, float]:
    """Syncs the weights, compares the probe's logprobs if `sync.verify` says so, and returns the gap as a metric.

    If logprobs differ, syncs once more. Collective over the world; the metric is equal on every rank.

    Args:
        first: whether this is the first sync of this process.

    Raises:
        EngineError: the engine did not load the weights, or logprobs differ after a second sync; on every rank.
        ServersLostError: no server was available within the limit; on every rank.
    """
    _sync(run, weight_version)
    verify = run.config.sync.verify
    if not engine_kind(run.config).verifies_weights or verify == "never" or (verify == "first" and not first):
        return {}
    tolerance = tolerance_of(run.config, run.device)
    gaps = probe_gaps(run, tolerance)
    if is_bad(gaps, tolerance):
        logger.warning("probe after the sync of version %d: logprobs differ by %s; syncing again", weight_version, gaps)
        _sync(run, weight_version)
        gaps = probe_gaps(run, tolerance)
        if is_bad(gaps, tolerance):
            raise EngineError(
                f"weight sync: expected the servers' logprobs of the probe within {tolerance} nats of the student's on "
                f"average, got {gaps} after a second sync of version {weight_version}; the servers' model is not the "
                "student's, or sync.tolerance is too small for their precision"
            )
    return {"sync/probe_gap": max(gaps.values())} if gaps else {}


def _sync(run: TrainingRun, weight_version: int) -> None:
    """Streams the student's weights to the engine, one Hugging Face tensor at a time.

    Collective over the tp x pp ranks of replica 0, the first of which has the engine; other replicas hold the same
    weights. One all-reduce over the world then shares the outcome. Engines consume the whole stream even if they fail,
    so that no rank is left waiting in a collective.

    Raises:
        MegatronTipError: the engine's error; raised on every rank.
    """
    run.enter("sync")
    with together(device=run.device):
        if run.student.groups.dp_rank == 0:
            stream = export_hf(run.student.model, run.architecture, run.student.groups)
            try:
                if run.source is not None:
                    run.source.engine.update_weights(stream, weight_version)
            finally:
                for _ in stream:  # on the other ranks; and after a failure, because the others still send the rest
                    pass


def probe_gaps(run: TrainingRun, tolerance: float) -> dict[str, float]:
    """Returns the mean absolute difference of the probe's logprobs per server, in nats; equal on every rank.

    A server with a gap above `tolerance` is no longer trusted. Collective over the world.
    """
    run.enter("generate")  # servers need their cache to score; the trainer's part is one short sequence
    vocab_size = run.architecture.vocab_size
    expected = probe_logprobs(run.student, vocab_size, run.device)

    def compare(source: RolloutSource) -> dict[str, float]:
        gaps = {}
        for url, logprobs in source.engine.input_logprobs(probe_ids(vocab_size)).items():
            gaps[url] = sum(abs(a - b) for a, b in zip(logprobs, expected, strict=True)) / len(expected)
            if is_bad({url: gaps[url]}, tolerance):
                source.engine.distrust(url)
        return gaps

    return run.on_source(compare)


def is_bad(gaps: dict[str, float], tolerance: float) -> bool:
    """Returns whether a gap exceeds `tolerance`; NaN does."""
    return not all(gap <= tolerance for gap in gaps.values())


def tolerance_of(config: Config, device: torch.device) -> float:
    """Returns the largest mean difference that rounding explains, in nats."""
    names = {config.model.dtype, config.rollout.dtype} - {"auto"}
    exact = names == {"float32"} or (not names and device.type == "cpu")
    return config.sync.tolerance or (FLOAT32_TOLERANCE if exact else REDUCED_TOLERANCE)
