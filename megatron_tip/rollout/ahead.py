"""Generation of the next batch during training on the current one."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from torch import Tensor

from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import EngineWrapper, RolloutEngine, SamplingParams


class AheadEngine(EngineWrapper):
    """An engine over servers that generates one batch ahead, in a thread that only waits for the servers.

    New weights go to the servers only between batches, because they must not change in the middle of one.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        super().__init__(engine)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._batch_name = ""
        self._future: Future[list[Rollout]] | None = None

    def start_next(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Starts the batch `sampling.batch_name`; at most one batch may be in progress."""
        assert self._future is None, f"{self._batch_name} has not been collected"
        self._batch_name = sampling.batch_name
        self._future = self._executor.submit(self._engine.generate, prompts, sampling)

    def wait(self) -> None:
        """Waits until nothing is being generated; `generate` raises any failure."""
        if self._future is not None:
            wait_for([self._future])

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns the batch of this name, started earlier or now; raises what its generation raised."""
        if self._future is None or self._batch_name != sampling.batch_name:
            return self._engine.generate(prompts, sampling)
        future, self._future = self._future, None
        return future.result()

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Waits for the batch in progress, then updates the weights."""
        self.wait()
        self._engine.update_weights(weights, weight_version)

    def close(self) -> None:
        """Abandons the batch in progress and closes the engine."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._engine.close()
