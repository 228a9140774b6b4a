"""The sync of new weights to the engine, and its verification."""

import itertools
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

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
"""Limit of the median absolute difference of a probe's logprobs if everything is float32, in nats."""

REDUCED_TOLERANCE = 0.08
"""The same in bfloat16, as a share of the spread of the probe's logprobs.

The spread, the mean difference between two of them, is what unrelated weights would differ by, and rounding grows with
it: both follow the size of the logits. On SmolLM2-135M-Instruct, whole and pruned, right implementations in bfloat16
differ by 0.02 to 0.04 of it, and one wrong layer (its heads permuted, its gate swapped with its up projection) or
another rotary base by 0.1 or more. The median, not the mean: at one position of a few models activations are so large
that rounding alone changes that logprob by nats.
"""


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


def _wait_for_receivers(source: RolloutSource, stop: StopSignals) -> None:
    with stop.interruptible():
        source.engine.wait_for_receivers()


def sync_engine(run: TrainingRun, *, weight_version: int, first: bool = False) -> dict[str, float]:
    """Syncs the weights, compares the probe's logprobs if `sync.verify` says so, and returns the gap as a metric.

    If logprobs differ by more than rounding explains, syncs once more. Collective over the world; the metric is equal
    on every rank.

    Args:
        first: whether this is the first sync of this process.

    Raises:
        EngineError: the engine did not load the weights, or logprobs differ after a second sync; on every rank.
        ServersLostError: no server was available within the limit; on every rank.
    """
    stream_weights(run, weight_version)
    verify = run.config.sync.verify
    if not engine_kind(run.config).verifies_weights or verify == "never" or (verify == "first" and not first):
        return {}
    bad, gaps = _probe(run)
    if bad:
        logger.warning("probe after the sync of version %d: %s; syncing again", weight_version, bad)
        stream_weights(run, weight_version)
        bad, gaps = _probe(run)
        if bad:
            raise EngineError(
                f"weight sync: {bad} after a second sync of version {weight_version}; the servers' model is not the "
                "student's, or sync.tolerance is too small for their precision"
            )
    return {"sync/probe_gap": max(gaps.values())} if gaps else {}


def stream_weights(run: TrainingRun, weight_version: int) -> None:
    """Streams the student's weights to the engine, one Hugging Face tensor at a time.

    Collective over the ranks that hold the first copy of the weights, the first of which has the engine; others take
    part only with an exchange of handles (sync.transport = "ipc"). All ranks first wait, between
    CPUs, until a server can take weights; one all-reduce over the world shares the outcome. Engines consume the whole
    stream even if they fail, so that no rank is left waiting in a collective.

    Raises:
        StopRequested: rank 0 received a stop signal while it waited for a server; raised on every rank.
        MegatronTipError: the engine's error; raised on every rank.
    """
    run.enter("sync")
    run.on_source(partial(_wait_for_receivers, stop=run.stop))
    with together(device=run.device):
        stream = _stream(run)
        try:
            if run.source is not None:
                run.source.engine.update_weights(stream, weight_version)
        finally:
            for _ in stream:  # on the other ranks; and after a failure, because the others still send the rest
                pass


def _stream(run: TrainingRun) -> Iterator[tuple[str, Tensor]]:
    """Returns the weights on the engine's rank; on the others, what must be exhausted meanwhile."""
    groups = run.student.groups
    if run.exchange is None:
        return export_hf(run.student.model, run.architecture, groups) if groups.holds_first_copy else iter(())
    weights = export_hf(run.student.model, run.architecture, groups, everywhere=True)
    return run.exchange.lead(weights) if dist.get_rank() == 0 else run.exchange.follow(weights)


def _probe(run: TrainingRun) -> tuple[str, dict[str, float]]:
    """Compares the probe's logprobs; returns what is wrong with them (empty: nothing), and the gap per server in nats.

    A server whose logprobs are wrong is no longer trusted. Equal on every rank. Collective over the world.
    """
    run.enter("generate")  # servers need their cache to score; the trainer's part is one short sequence
    vocab_size = run.architecture.vocab_size
    expected = probe_logprobs(run.student, vocab_size, run.device)

    def compare(source: RolloutSource) -> tuple[str, dict[str, float]]:
        tolerance = tolerance_of(run.config, run.device, expected)
        found = source.engine.input_logprobs(probe_ids(vocab_size))
        gaps = {url: median_gap(logprobs, expected) for url, logprobs in found.items()}
        bad = {url: gap for url, gap in gaps.items() if not gap <= tolerance}
        for url in bad:
            source.engine.distrust(url)
        text = f"expected the median gap of the probe's logprobs within {tolerance:.4g} nats, got {bad}"
        return text if bad else "", gaps

    bad, gaps = run.on_source(compare)
    return bad, gaps


def median_gap(found: Sequence[float], expected: Sequence[float]) -> float:
    """Returns the median absolute difference; NaN if one of the values is NaN."""
    gaps = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else statistics.median(gaps)


def tolerance_of(config: Config, device: torch.device, expected: Sequence[float]) -> float:
    """Returns the largest median gap that rounding explains, in nats, for a probe with the logprobs `expected`."""
    names = {config.model.dtype, config.rollout.dtype} - {"auto"}
    exact = names == {"float32"} or (not names and device.type == "cpu")
    spread = statistics.mean(abs(a - b) for a, b in itertools.combinations(expected, 2))
    return config.sync.tolerance or (FLOAT32_TOLERANCE if exact else REDUCED_TOLERANCE * spread)
