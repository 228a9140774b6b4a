"""The requests of one batch: sent to the servers, repeated elsewhere after failures, and finally set aside."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from megatron_tip.errors import EngineError, ServerAnswerError, ServerError, ServerRefusedError
from megatron_tip.records import Prompt, Rollout, logprobs, token_ids
from megatron_tip.rollout.engine import FINISH_REASONS, SamplingParams
from megatron_tip.rollout.progress_clock import ProgressClock, Show, show_nothing
from megatron_tip.rollout.sglang.answers import Generation
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.pool import PooledServer, ServerPool
from megatron_tip.seeds import derive_seed

logger = logging.getLogger(__name__)

Job = tuple[int, int]
"""Position of the prompt in the batch, number of the sample."""


@dataclass(frozen=True)
class SetAside:
    """A sample that used up its attempts, with its last error."""

    prompt: Prompt
    sample_index: int
    num_attempts: int
    error: str


@dataclass
class Progress:
    """The state of each job of one batch, from which an interrupted batch continues.

    Every job ends in exactly one of `rollouts`, `set_aside` and `dropped`.
    """

    batch_name: str
    rollouts: dict[Job, Rollout] = field(default_factory=dict)
    set_aside: dict[Job, SetAside] = field(default_factory=dict)
    dropped: set[Job] = field(default_factory=set)
    num_failures: dict[Job, int] = field(default_factory=dict)
    num_repeated: int = 0
    num_wrong_version: int = 0
    num_stalls: int = 0
    _num_over_at_stall: int = -1

    def note_stall(self) -> int:
        """Counts a loss of the weights; returns how many there were since a job last ended."""
        self.num_stalls = self.num_stalls + 1 if self.num_over == self._num_over_at_stall else 1
        self._num_over_at_stall = self.num_over
        return self.num_stalls

    def metrics(self) -> dict[str, float]:
        """Returns the counts under the names of a step's metrics."""
        return {
            "rollout/num_set_aside": float(len(self.set_aside)),
            "rollout/num_dropped": float(len(self.dropped)),
            "rollout/num_repeated": float(self.num_repeated),
            "rollout/num_wrong_version": float(self.num_wrong_version),
        }

    @property
    def num_over(self) -> int:
        return len(self.rollouts) + len(self.set_aside) + len(self.dropped)

    def is_over(self, job: Job) -> bool:
        return job in self.rollouts or job in self.set_aside or job in self.dropped


class BatchRun:
    """A run of the open jobs of one batch with the weights `version`, limited by the pool's concurrency.

    Args:
        weight_version: training step of `version`, recorded in the rollouts.
        attempts: failures after which a sample is set aside.
        drop_wrong_version: drop responses of other weights instead of regenerating them.
        show: shows the progress, including tokens of unfinished responses.
    """

    def __init__(
        self,
        pool: ServerPool,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        progress: Progress,
        *,
        version: str,
        weight_version: int,
        attempts: int,
        drop_wrong_version: bool,
        show: Show = show_nothing,
    ) -> None:
        self._pool = pool
        self._prompts = prompts
        self._sampling = sampling
        self._progress = progress
        self._version = version
        self._weight_version = weight_version
        self._attempts = attempts
        self._drop_wrong_version = drop_wrong_version
        self._clock = ProgressClock(len(prompts) * sampling.samples_per_prompt, show)
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Runs until every job has ended.

        Raises:
            WeightsLostError: no server holds the weights any more; the progress keeps what has finished.
            ServersLostError: no server is left.
        """
        samples = range(self._sampling.samples_per_prompt)
        jobs = [(place, sample) for place in range(len(self._prompts)) for sample in samples]
        open_jobs = [job for job in jobs if not self._progress.is_over(job)]
        if not open_jobs:
            return
        num_threads = min(len(open_jobs), self._pool.settings.concurrency * len(self._pool.servers))
        executor = ThreadPoolExecutor(num_threads, thread_name_prefix="rollout")
        try:
            futures = [executor.submit(self._finish, job) for job in open_jobs]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:  # even Ctrl-C: nobody will use what is still being generated
            self._stopped.set()
            self._pool.abort_all()
            raise
        finally:
            self._stopped.set()
            executor.shutdown(wait=True, cancel_futures=True)

    def _finish(self, job: Job) -> None:
        """Repeats one job until it has ended."""
        while not self._stopped.is_set() and not self._progress.is_over(job):
            with self._pool.lease(self._version, self._stopped) as server:
                client = self._pool.client_for(server, self._version)
                try:
                    generation = self._generate(client, job)
                    self._check(generation, client.url)
                except EngineError as error:
                    if self._stopped.is_set():
                        return
                    if not isinstance(error, ServerRefusedError | ServerAnswerError):
                        self._doubt(server, client)
                    self._failed(job, error)
                    continue
                if generation.weight_version == self._version:
                    self._accept(job, generation)
                else:
                    self._wrong_version(server, client, job, generation.weight_version)

    def _doubt(self, server: PooledServer, client: SGLangClient) -> None:
        if client is self._pool.router:
            self._pool.pass_over_router()
        else:
            self._pool.suspect(server)

    def _generate(self, client: SGLangClient, job: Job) -> Generation:
        sampling = self._sampling
        return client.generate(
            self._prompts[job[0]].prompt_ids,
            max_new_tokens=sampling.max_response_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=sampling.stop_token_ids,
            seed=derive_seed(sampling.seed, *job),
            on_tokens=lambda count: self._clock.note(job, count, len(self._progress.rollouts)),
        )

    def _check(self, generation: Generation, url: str) -> None:
        """Raises ServerError if the server aborted the response or stopped it without a stop id of the run."""
        if generation.finish_reason not in FINISH_REASONS:
            raise ServerError(f"{url}: the response was aborted: {generation.abort_message or 'no reason given'}")
        last, stops = generation.response_ids[-1:], self._sampling.stop_token_ids
        if generation.finish_reason == "stop" and last and last[0] not in stops:
            raise ServerAnswerError(
                f"{url}: expected a response to end with one of {stops}, got {last[0]}; the server's eos_token_id "
                "differs from the run's"
            )

    def _accept(self, job: Job, generation: Generation) -> None:
        """Records a finished response."""
        prompt = self._prompts[job[0]]
        rollout = Rollout(
            prompt_index=prompt.index,
            sample_index=job[1],
            prompt_ids=token_ids(prompt.prompt_ids),
            response_ids=token_ids(generation.response_ids),
            rollout_logprobs=logprobs(min(logprob, 0.0) for logprob in generation.logprobs),
            finish_reason=generation.finish_reason,
            weight_version=self._weight_version,
        )
        with self._lock:
            self._progress.rollouts[job] = rollout

    def _wrong_version(self, server: PooledServer, client: SGLangClient, job: Job, version: str) -> None:
        logger.warning(
            "%s generated with the weights %s instead of %s: is another trainer using it?",
            client.url,
            version,
            self._version,
        )
        if client is self._pool.router:
            self._pool.pass_over_router()
        else:
            self._pool.set_weights(server, None)
        with self._lock:
            self._progress.num_wrong_version += 1
            if self._drop_wrong_version:
                self._progress.dropped.add(job)

    def _failed(self, job: Job, error: Exception) -> None:
        with self._lock:
            count = self._progress.num_failures.get(job, 0) + 1
            self._progress.num_failures[job] = count
            self._progress.num_repeated += 1
            if count < self._attempts:
                return
            prompt = self._prompts[job[0]]
            self._progress.set_aside[job] = SetAside(prompt, job[1], count, str(error))
        logger.warning("prompt %d, sample %d is set aside after %d attempts: %s", prompt.index, job[1], count, error)
