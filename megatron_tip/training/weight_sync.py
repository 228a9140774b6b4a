"""New weights to whoever generates, and the proof that they arrived."""

from __future__ import annotations

import logging
from typing import Any

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.bridge import export_hf
from megatron_tip.errors import EngineError, MegatronTipError, PeerError, ServersLostError
from megatron_tip.models.student import Student
from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.parallel.stop import StopRequested
from megatron_tip.rollout.engine import RolloutEngine, ServedEngine
from megatron_tip.training.probe import probe_ids, probe_logprobs
from megatron_tip.training.run import TrainingRun

logger = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-4
REDUCED_TOLERANCE = 0.05
"""Default limits of the mean difference of a probe's logprobs, in nats; the second where bfloat16 takes part."""


def update_engine(run: TrainingRun, *, weight_version: int, first: bool = False) -> dict[str, float]:
    """Gives the engine the student's weights, once it has generated what it generates ahead; returns the metrics of
    engine and sync, equal on every rank. Collective over the world. Arguments and errors as of `sync_engine`.

    Raises:
        StopRequested: the first process was told to stop while it waited for the batch ahead; on every rank.
    """
    if run.config.rollout.ahead:
        with run.timer.phase("rollout"):
            _wait_for_batch_ahead(run)
    with run.timer.phase("sync"):
        metrics = sync_engine(run, weight_version=weight_version, first=first)
    if run.config.rollout.engine != "sglang":
        return metrics
    batch_name = run.sampling.for_step(weight_version).batch_name
    own = run.engine.take_metrics(batch_name) if isinstance(run.engine, ServedEngine) else {}
    return metrics | broadcast_json(own, source=0, device=run.device)


def _wait_for_batch_ahead(run: TrainingRun) -> None:
    """Returns when nothing is being generated: servers do not change weights in the middle of a batch."""
    told = 0
    if run.ahead:
        try:
            with run.stop.interruptible():
                run.ahead.wait()
        except StopRequested as request:
            told = request.signal_number
    told = broadcast_json(told, source=0, device=run.device)
    if told:
        raise StopRequested(told)


def sync_weights(
    student: Student, architecture: ModelArchitecture, engine: RolloutEngine | None, *, weight_version: int
) -> None:
    """Streams the student's weights to the engine, one Hugging Face tensor at a time.

    Collective over the tp x pp ranks of replica 0; other replicas hold the same weights and return at once. `engine`
    lives in the first process of the world, a rank of replica 0; None elsewhere.
    """
    if student.groups.dp_rank != 0:
        return
    stream = export_hf(student.model, architecture, student.groups)
    if engine is not None:
        engine.update_weights(stream, weight_version)
    else:
        for _ in stream:
            pass


def sync_engine(run: TrainingRun, *, weight_version: int, first: bool = False) -> dict[str, float]:
    """Syncs the weights and, where `sync.verify` asks for it, compares the probe's logprobs; returns what it measured.

    Servers whose logprobs differ get the weights once more. `first`: this is the first sync of this process.
    Collective over the world; the measures are equal on every rank.

    Raises:
        EngineError: logprobs differ after a second sync, on every rank; or the engine did not take the weights, in the
            first process: a PeerError on all others then, its `cause` "EngineError".
        ServersLostError: no server within the limit; on every rank.
    """
    _sync(run, weight_version)
    verify = run.config.sync.verify
    if run.config.rollout.engine != "sglang" or verify == "never" or (verify == "first" and not first):
        return {}
    gaps = probe_gaps(run)
    if is_bad(run, gaps):
        logger.warning("probe after the sync of version %d: logprobs differ by %s; syncing again", weight_version, gaps)
        _sync(run, weight_version)
        gaps = probe_gaps(run)
        if is_bad(run, gaps):
            raise EngineError(
                f"weight sync: expected the servers' logprobs of the probe within {tolerance_of(run)} nats of the "
                f"student's on average, got {gaps} after a second sync of version {weight_version}; the servers' model "
                "is not the student's, or sync.tolerance is too small for their precision"
            )
    return {"sync/probe_gap": max(gaps.values())} if gaps else {}


def _sync(run: TrainingRun, weight_version: int) -> None:
    """`sync_weights`; every rank learns whether the engine took them. One broadcast over the world.

    Engines consume the stream to its end whatever happens, so that a failure of theirs leaves no rank in a collective.
    """
    failure = None
    try:
        sync_weights(run.student, run.architecture, run.engine, weight_version=weight_version)
    except MegatronTipError as error:
        failure = error
    kind = EngineError if isinstance(failure, EngineError) else type(failure)
    kind = ServersLostError if isinstance(failure, ServersLostError) else kind
    told = broadcast_json(failure and [kind.__name__, str(failure)], source=0, device=run.device)
    if told is None:
        return
    cause, text = told
    if cause == ServersLostError.__name__:
        raise ServersLostError(text)
    raise failure or PeerError(f"weight sync: the first process failed with {text}", cause=cause)


def probe_gaps(run: TrainingRun) -> dict[str, float]:
    """By server, the mean absolute difference of the probe's logprobs, in nats; equal on every rank.

    A server with a gap beyond the tolerance is not trusted from then on. Collective over the world.
    """
    expected = probe_logprobs(run)
    gaps: dict[str, Any] = {}
    if isinstance(run.engine, ServedEngine):
        ids = probe_ids(run.architecture.vocab_size)
        for url, logprobs in run.engine.input_logprobs(ids).items():
            gaps[url] = sum(abs(a - b) for a, b in zip(logprobs, expected, strict=True)) / len(expected)
            if is_bad(run, {url: gaps[url]}):
                run.engine.distrust(url)
    return broadcast_json(gaps, source=0, device=run.device)


def is_bad(run: TrainingRun, gaps: dict[str, float]) -> bool:
    return not all(gap <= tolerance_of(run) for gap in gaps.values())  # NaN is within no tolerance


def tolerance_of(run: TrainingRun) -> float:
    """The largest mean difference that is rounding."""
    config = run.config
    names = {config.model.dtype, config.rollout.dtype} - {"auto"}
    exact = names == {"float32"} or (not names and run.device.type == "cpu")
    return config.sync.tolerance or (FLOAT32_TOLERANCE if exact else REDUCED_TOLERANCE)
