"""The rollout engine over SGLang servers; it survives the failure of servers."""

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
from megatron_tip.rollout.engine import WEIGHTS, RolloutEngine, SamplingParams
from megatron_tip.rollout.progress_clock import Show, show_nothing
from megatron_tip.rollout.sglang.answers import checked_logprobs
from megatron_tip.rollout.sglang.jobs import BatchRun, Progress, SetAside
from megatron_tip.rollout.sglang.memory import ServerMemory
from megatron_tip.rollout.sglang.pool import PooledServer, ServerPool
from megatron_tip.rollout.sglang.weights.proof import WeightProof
from megatron_tip.rollout.sglang.weights.transport import WeightTransport

logger = logging.getLogger(__name__)

MAX_STALLS = 4
"""Consecutive losses of the weights, without a finished response in between, before the run gives up."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
"""The pause after a sync that reached no server; it doubles with each further one."""

MAX_EMPTY_BATCHES = 3
"""Consecutive batches without any response before the run gives up."""

RESTORE_SECONDS = 60.0
"""How long `close` waits for given servers to take back their memory."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of an SGLangEngine. `run_id` distinguishes this run's weights from another trainer's on the same server.
    `attempts`: failures of a sample before it is set aside in `set_aside_path`. `num_layers`: the model's.
    `drop_wrong_version`: drop responses of other weights instead of regenerating them. `releases_memory`: `hold_memory`
    will be called. `show`: shows a batch's progress.
    """

    run_id: str
    attempts: int
    set_aside_path: Path
    num_layers: int
    drop_wrong_version: bool = False
    releases_memory: bool = False
    show: Show = show_nothing


def new_run_id() -> str:
    """Returns a random name, short enough to be part of every weight version."""
    return secrets.token_hex(4)


class SGLangEngine(RolloutEngine):
    """An engine that generates on `pool` with weights from `transport`. It starts the pool; `close` closes both.

    A server generates only if it holds all of the last synced weights. Sampling on the servers is random: SGLang takes
    no seed per request, so a repeated run samples other tokens.
    """

    def __init__(self, pool: ServerPool, transport: WeightTransport, settings: EngineSettings) -> None:
        self._pool = pool
        self._transport = transport
        self._settings = settings
        self._proof = WeightProof(settings.num_layers)
        self._version: str | None = None
        self._weight_version = -1
        self._progress: Progress | None = None
        self._failed_syncs = 0
        self._failing_since = 0.0
        self._empty_batches = 0
        self._batch_metrics: dict[str, dict[str, float]] = {}
        self._sync_metrics: dict[str, float] = {}
        self._memory = ServerMemory(pool, run_id=settings.run_id)
        pool.on_back = self._weights_of_returned
        pool.start()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns `samples_per_prompt` rollouts per prompt, prompt-major, without those set aside or dropped.

        Raises:
            WeightsLostError: no server holds the weights; after `update_weights` the same call continues.
            ServersLostError: no server came up within the limit, or servers keep losing the weights.
            EngineError: all responses of several consecutive batches were set aside or dropped.
        """
        progress = self._progress_of(sampling.batch_name)
        begin = time.monotonic()
        self._finish(prompts, sampling, progress)
        self._progress = None
        self._write_set_aside(sampling.batch_name, list(progress.set_aside.values()))
        self._batch_metrics[sampling.batch_name] = progress.metrics() | {
            "rollout/generate_seconds": time.monotonic() - begin
        }
        self._note_emptiness(sampling.batch_name, progress)
        return [progress.rollouts[job] for job in sorted(progress.rollouts)]

    def wait_for_receivers(self) -> None:
        """Waits for a server that can take weights; after a sync that reached none, pauses first.

        Raises:
            ServersLostError: no server came up within the limit.
        """
        if self._failed_syncs:
            time.sleep(min(FIRST_PAUSE_SECONDS * 2 ** (self._failed_syncs - 1), LONGEST_PAUSE_SECONDS))
        self._pool.wait_for_any()

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Sends `weights` to every running server as version `weight_version`; consumes the stream.

        A server that does not take all of them, or is seen to hold others, generates nothing until a later sync. If no
        server takes them, the next `generate` raises WeightsLostError.

        Raises:
            OutputError: the shared folder is not writable.
            ServersLostError: no server came up within the limit, or no sync reached one for as long.
        """
        version = f"{self._settings.run_id}/{weight_version}"
        stream = self._proof.watched(weights, version)
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
        taken = self._proof.confirmed(taken, version)
        self._version, self._weight_version = version, weight_version
        for server in servers:
            if server in taken:
                self._pool.set_weights(server, version)
            else:
                self._pool.suspect(server)
        self._note_reach(len(taken), begin)
        self._sync_metrics = {
            "sync/bytes": float(self._transport.num_bytes),
            "sync/seconds": time.monotonic() - begin,
            "sync/num_servers": float(len(taken)),
        }

    def _note_reach(self, num_taken: int, begin: float) -> None:
        """Raises ServersLostError if no sync has reached a server for longer than the pool waits for one."""
        if num_taken:
            self._failed_syncs = 0
            return
        if not self._failed_syncs:
            self._failing_since = begin
        self._failed_syncs += 1
        limit = self._pool.settings.wait
        if self._failed_syncs > 1 and time.monotonic() - self._failing_since > limit:
            raise ServersLostError(
                f"sglang: {self._failed_syncs} weight syncs in a row, over {limit:.0f} s (sglang.wait_seconds), "
                "reached no server; see the log above"
            )

    def hold_memory(self, held: frozenset[str], *, may_start: bool) -> None:
        """Makes the servers hold exactly `held` and give back the rest of their memory; see `RolloutEngine`."""
        assert self._settings.releases_memory, "the servers were checked and started for it"
        if WEIGHTS not in held:
            self._version = None  # no server that comes back may be taken for one that has them
        self._memory.hold(held, may_start=may_start)

    def input_logprobs(self, input_ids: Sequence[int]) -> dict[str, list[float]]:
        """Returns the logprobs of all ids but the first, given the ids before them, by server with the last weights."""
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
        """Stops the server at `url` from generating until it has received weights again."""
        for server in self._pool.up():
            if server.url == url:
                self._pool.set_weights(server, None)

    def take_metrics(self, batch_name: str) -> dict[str, float]:
        """Returns metrics of that batch with its further calls (named "<batch>_..."), the last sync and the servers."""
        own, later = Counter[str](), {}
        for name, values in self._batch_metrics.items():
            if name == batch_name or name.startswith(f"{batch_name}_"):
                own.update(values)
            elif name > batch_name:  # earlier ones are no longer needed
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
        """Stops our own servers; leaves given servers running, with all their memory."""
        if self._settings.releases_memory:
            self._memory.restore(RESTORE_SECONDS)
        self._transport.close()
        self._pool.close()

    def _finish(self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: Progress) -> None:
        """Runs the unfinished jobs of a batch. Raises as `generate`."""
        if self._version is None or self._failed_syncs:
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
            show=self._settings.show,
        )
        try:
            run.run()
        except WeightsLostError as error:
            if progress.note_stall() < MAX_STALLS:
                raise
            raise ServersLostError(
                f"sglang: the servers lost the weights {MAX_STALLS} times before any response finished ({error}); "
                "is another trainer using them?"
            ) from error

    def _progress_of(self, batch_name: str) -> Progress:
        if self._progress is None or self._progress.batch_name != batch_name:
            self._progress = Progress(batch_name)
        return self._progress

    def _weights_of_returned(self, server: PooledServer) -> str | None:
        """Returns the weight version of a started or returned server: the last if it still has it or the transport can
        resend it.

        Raises:
            ServerMismatchError: the server cannot take the weights.
            ServerError: it says that it has the last weights, and has others.
        """
        self._transport.check(server)
        if self._settings.releases_memory:
            self._memory.check(server)
        version = self._version
        reported = server.http.model_info().weight_version
        if version is not None and reported == version and self._proof.still_holds(server, version):
            return version
        version = self._transport.refresh(server)
        if version is not None:
            self._proof.confirm(server, version)
        return version

    def _note_emptiness(self, batch_name: str, progress: Progress) -> None:
        """Raises EngineError if several consecutive batches are empty: the prompts cannot be the cause."""
        self._empty_batches = 0 if progress.rollouts or not progress.num_over else self._empty_batches + 1
        if self._empty_batches < MAX_EMPTY_BATCHES:
            return
        last = next((entry.error for entry in progress.set_aside.values()), "generated with other weights")
        raise EngineError(
            f"sglang: no response was left in {MAX_EMPTY_BATCHES} batches in a row, the last of them {batch_name} with "
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
