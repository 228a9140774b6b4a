"""Generation of the next batch beside the training of this one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams


class AheadGenerator:
    """Calls `engine.generate` for one batch in a thread of its own, which waits for servers and leaves the CPU free.

    `wait` before new weights go to the engine: its servers must not change in the middle of a batch.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._batch_name = ""
        self._future: Future[list[Rollout]] | None = None

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Begins the batch that `sampling.batch_name` names; at most one is under way."""
        assert self._future is None, f"{self._batch_name} has not been taken"
        self._batch_name = sampling.batch_name
        self._future = self._executor.submit(self._engine.generate, prompts, sampling)

    def wait(self) -> None:
        """Returns when nothing is being generated; what went wrong is raised by `take`."""
        if self._future is not None:
            wait_for([self._future])

    def take(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """The batch of this name, begun earlier or now; raises what `engine.generate` raised."""
        if self._future is None or self._batch_name != sampling.batch_name:
            return self._engine.generate(prompts, sampling)
        future, self._future = self._future, None
        return future.result()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
