"""The rollout engine on SGLang servers: generation over a pool, weights by a transport, faults survived."""

import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_tip.errors import EngineError, ServerError, ServersLostError, WeightsLostError
from megatron_tip.files import output_errors
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams
from megatron_tip.rollout.sglang.answers import checked_logprobs
from megatron_tip.rollout.sglang.jobs import BatchRun, Progress, SetAside
from megatron_tip.rollout.sglang.pool import PooledServer, ServerPool
from megatron_tip.rollout.sglang.weights.transport import WeightTransport

logger = logging.getLogger(__name__)

MAX_SYNCS = 4
"""Syncs in a row that reach no server, or after which no response is finished, before the run gives up."""

MAX_EMPTY_BATCHES = 3
"""Batches in a row of which nothing is left before the run gives up."""


@dataclass(frozen=True)
class EngineSettings:
    """`run_id` tells this run's weights from another trainer's on the same server. `attempts`: failures of a sample
    before it is set aside into `set_aside_path`. `drop_wrong_version`: leave out what was generated with other weights
    instead of generating it anew."""

    run_id: str
    attempts: int
    set_aside_path: Path
    drop_wrong_version: bool = False


def new_run_id() -> str:
    """A random name, short enough to be part of every weight version."""
    return secrets.token_hex(4)


class SGLangEngine(RolloutEngine):
    """Generates on `pool`, with weights that `transport` brings there. Starts the pool; `close` ends both.

    No server generates unless it holds all of the last weights that were synced. Sampling on the servers is random:
    SGLang takes no seed a request, so that a run does not repeat itself token by token.
    """

    def __init__(self, pool: ServerPool, transport: WeightTransport, settings: EngineSettings) -> None:
        self._pool = pool
        self._transport = transport
        self._settings = settings
        self._version: str | None = None
        self._weight_version = -1
        self._progress: Progress | None = None
        self._failed_syncs = 0
        self._empty_batches = 0
        self._batch_metrics: dict[str, dict[str, float]] = {}
        self._sync_metrics: dict[str, float] = {}
        pool.on_back = self._weights_of_returned
        pool.start()

    def health(self) -> None:
        """Raises EngineError unless a server is up and holds the last weights."""
        if self._version is None:
            raise EngineError("sglang: expected weights, got none yet; call update_weights first")
        if not self._pool.up(self._version):
            raise WeightsLostError(f"sglang: no server that is up holds the weights {self._version}")

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns `samples_per_prompt` rollouts a prompt, prompt-major, without those set aside or dropped.

        Raises:
            WeightsLostError: no server holds the weights; after `update_weights` the same call goes on where it was.
            ServersLostError: no server is left within the limit, or they keep losing the weights.
            EngineError: several batches in a row were set aside or dropped whole.
        """
        progress = self._progress_of(sampling.batch_name)
        begin = time.monotonic()
        self._finish(prompts, sampling, progress)
        self._progress = None
        self._failed_syncs = 0
        self._write_set_aside(sampling.batch_name, list(progress.set_aside.values()))
        self._batch_metrics[sampling.batch_name] = progress.metrics() | {
            "rollout/generate_seconds": time.monotonic() - begin
        }
        self._note_emptiness(sampling.batch_name, progress)
        return [progress.rollouts[job] for job in sorted(progress.rollouts)]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Brings `weights` to every server that is up, as their version `weight_version`; consumes the stream.

        A server that does not take all of them generates nothing until a later sync. When none does, the next
        `generate` raises WeightsLostError.

        Raises:
            OutputError: the shared folder cannot be written.
            ServersLostError: no server is up within the limit, or several syncs in a row reached none.
        """
        stream = iter(weights)
        version = f"{self._settings.run_id}/{weight_version}"
        self._version = None
        begin = time.monotonic()
        try:
            servers = self._pool.wait_for_any()
            for server in servers:
                self._pool.set_weights(server, None)
            taken = self._transport.send(servers, stream, version)
        finally:
            for _ in stream:
                pass
        self._version, self._weight_version = version, weight_version
        for server in taken:
            self._pool.set_weights(server, version)
        self._failed_syncs = 0 if taken else self._failed_syncs + 1
        if self._failed_syncs >= MAX_SYNCS:
            raise ServersLostError(f"sglang: {MAX_SYNCS} weight syncs in a row reached no server; see the log above")
        self._sync_metrics = {
            "sync/bytes": float(self._transport.num_bytes),
            "sync/seconds": time.monotonic() - begin,
            "sync/num_servers": float(len(taken)),
        }

    def input_logprobs(self, input_ids: Sequence[int]) -> dict[str, list[float]]:
        """By server that holds the weights: the logprob of each id after the ids before it, without the first."""
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        found = {}
        for server in self._pool.up(self._version) if self._version else []:
            try:
                triples = server.http.generate_answers(body)[0].meta_info.input_token_logprobs
                found[server.url] = checked_logprobs((triples or [])[1:], input_ids[1:], where=server.url)
            except ServerError as error:
                logger.warning("probe: %s", error)
                self._pool.set_weights(server, None)
                self._pool.suspect(server)
        return found

    def distrust(self, url: str) -> None:
        """Has the server at `url` generate nothing until it got weights anew."""
        for server in self._pool.up():
            if server.url == url:
                self._pool.set_weights(server, None)

    def take_metrics(self, batch_name: str) -> dict[str, float]:
        """What became of that batch, its further calls (named "<batch>_...") included, of the last sync, and of the
        servers so far.
        """
        own, later = Counter[str](), {}
        for name, values in self._batch_metrics.items():
            if name == batch_name or name.startswith(f"{batch_name}_"):
                own.update(values)
            elif name > batch_name:  # held-out batches and those of earlier steps nobody will ask for
                later[name] = values
        self._batch_metrics = later
        return {
            **own,
            **self._sync_metrics,
            "servers/num_up": float(len(self._pool.up())),
            "servers/num_lost": float(self._pool.num_lost),
            "servers/num_restarts": float(self._pool.num_restarts),
        }

    def close(self) -> None:
        """Ends the servers of our own and leaves the others to themselves."""
        self._transport.close()
        self._pool.close()

    def _finish(self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: Progress) -> None:
        """Runs the jobs of a batch that are not over yet. Raises as `generate`."""
        if self._version is None:
            raise WeightsLostError("sglang: the servers have no complete weights")
        run = BatchRun(
            self._pool,
            prompts,
            sampling,
            progress,
            version=self._version,
            weight_version=self._weight_version,
            attempts=self._settings.attempts,
            drop_wrong_version=self._settings.drop_wrong_version,
        )
        try:
            run.run()
        except WeightsLostError as error:
            if progress.note_stall() < MAX_SYNCS:
                raise
            raise ServersLostError(
                f"sglang: the servers lost the weights {MAX_SYNCS} times before one response was finished ({error}); "
                "does another trainer use them?"
            ) from error

    def _progress_of(self, batch_name: str) -> Progress:
        if self._progress is None or self._progress.batch_name != batch_name:
            self._progress = Progress(batch_name)
        return self._progress

    def _weights_of_returned(self, server: PooledServer) -> str | None:
        """What a server that is back, or has started, holds: the last weights still, or once more where the transport
        kept them. Raises ServerMismatchError for one that cannot take them.
        """
        self._transport.check(server)
        if self._version is not None and server.http.model_info().weight_version == self._version:
            return self._version
        return self._transport.refresh(server)

    def _note_emptiness(self, batch_name: str, progress: Progress) -> None:
        """Raises EngineError when nothing was left of several batches in a row: that is no prompt's fault."""
        self._empty_batches = 0 if progress.rollouts or not progress.num_over else self._empty_batches + 1
        if self._empty_batches < MAX_EMPTY_BATCHES:
            return
        last = next((entry.error for entry in progress.set_aside.values()), "generated with other weights")
        raise EngineError(
            f"sglang: nothing was left of {MAX_EMPTY_BATCHES} batches in a row, the last of them {batch_name} of "
            f"{progress.num_over} responses; see {self._settings.set_aside_path}. The last error: {last}"
        )

    def _write_set_aside(self, batch_name: str, entries: Sequence[SetAside]) -> None:
        if not entries:
            return
        path = self._settings.set_aside_path
        lines = [
            json.dumps(
                {
                    "batch": batch_name,
                    "prompt_index": entry.prompt.index,
                    "sample_index": entry.sample_index,
                    "num_attempts": entry.num_attempts,
                    "error": entry.error,
                    "prompt_ids": entry.prompt.prompt_ids,
                    "prompt_text": entry.prompt.text,
                },
                ensure_ascii=False,
            )
            + "\n"
            for entry in entries
        ]
        with output_errors(path), path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
