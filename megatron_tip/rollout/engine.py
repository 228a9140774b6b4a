"""The interface between the training loop and rollout engines, and the inputs of an engine's construction."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_tip.config import Config
from megatron_tip.conversion.model_folder import ModelFolder
from megatron_tip.placement.placement import Placement
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.handover.exchange import HandleExchange
from megatron_tip.rollout.progress_clock import Show, show_nothing
from megatron_tip.seeds import derive_seed

FINISH_REASONS = ("stop", "length", "turns")

WEIGHTS, CACHE = "weights", "cache"
ALL_MEMORY = frozenset({WEIGHTS, CACHE})
"""What a server holds of its device's memory."""


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling. A response ends with the first of `stop_token_ids`, which it includes.

    `seed` and the positions in the list of prompts determine every random choice of a call. `batch_name` names the
    batch of the run ("step_000001"); its rollouts are stored under this name.
    """

    max_response_tokens: int
    temperature: float
    top_p: float
    samples_per_prompt: int
    stop_token_ids: tuple[int, ...]
    seed: int
    batch_name: str = ""

    def for_step(self, step: int) -> "SamplingParams":
        """Returns the parameters for training step `step` (from 1), with a separate seed."""
        return replace(self, seed=derive_seed(self.seed, 1, step), batch_name=f"step_{step:06d}")

    def for_heldout(self, step: int) -> "SamplingParams":
        """Returns the parameters for the held-out prompts after `step` steps: one sample, the same seed always."""
        return replace(self, samples_per_prompt=1, seed=derive_seed(self.seed, 2), batch_name=f"heldout_{step:06d}")


@dataclass(frozen=True)
class EngineNeeds:
    """The inputs that engines are built from.

    `student`: as trained, without its dropped layers. `placement`: where servers run. `vocab_size`: ids that student
    and teacher share. `device`: the first process's. `num_threads`: CPU threads of all workers on this machine; an
    engine in the first process may use all of them, because the others wait for it. `dtype`: of the engine's weights.
    `weights_dtype`: of the student's parameters in the stream. `exchange`: this rank's part in weight syncs by IPC, if
    other ranks take part. `releases_memory`: `hold_memory` will be called, for which servers need a memory saver.
    `show`: shows the progress of a batch.
    """

    config: Config
    student: ModelFolder
    placement: Placement
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    device: torch.device
    num_threads: int
    dtype: torch.dtype
    weights_dtype: torch.dtype
    exchange: HandleExchange | None = None
    releases_memory: bool = False
    show: Show = show_nothing


class RolloutEngine(ABC):
    """A generator of responses with the student's weights, in the first process of the run.

    An engine implements the first three methods. The defaults of the others suit an engine that generates in this
    process and only when asked.
    """

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns `samples_per_prompt` rollouts per prompt, prompt-major, tagged with the current weight version.

        An engine over servers omits samples that keep failing and counts them in its metrics.

        Raises:
            WeightsLostError: the weights are lost; after `update_weights` the same call continues where it stopped.
            EngineError: the engine failed or returned something other than rollouts.
        """

    @abstractmethod
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Loads the student's weights from a stream of Hugging Face names and tensors.

        Consumes the whole stream even if it refuses a tensor, because other ranks take part in its collectives.
        """

    def start_next(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:  # noqa: B027
        """Starts the batch of a later `generate` call, if the engine can work while the student trains."""

    def wait(self) -> None:  # noqa: B027
        """Waits until nothing is being generated."""

    def wait_for_receivers(self) -> None:  # noqa: B027
        """Waits until `update_weights` can send; a stop signal may interrupt this, but not `update_weights`."""

    def hold_memory(self, held: frozenset[str], *, may_start: bool) -> None:  # noqa: B027
        """Makes servers hold exactly `held`, some of ALL_MEMORY, and give back the rest of their device's memory.

        Weights that were given back have no values until `update_weights`; `generate` and `input_logprobs` need all.
        A server that fails to is left out. Nothing may be in progress.

        Args:
            may_start: whether a server of our own that ended may take memory to start again.
        """

    def input_logprobs(self, input_ids: Sequence[int]) -> dict[str, list[float]]:
        """Returns the logprobs of all ids but the first, given the ids before them, by server with the last weights.

        Only for engines with `EngineKind.verifies_weights`.
        """
        return {}

    def distrust(self, url: str) -> None:  # noqa: B027
        """Stops a server from generating until it has received weights again."""

    def take_metrics(self, batch_name: str) -> dict[str, float]:
        """Returns metrics of that batch, of the last sync, and of the servers so far."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Stops what the engine started."""


class EngineWrapper(RolloutEngine):
    """Base of engines that extend another one, `_engine`; delegates everything to it by default."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        return self._engine.generate(prompts, sampling)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        self._engine.update_weights(weights, weight_version)

    def start_next(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        self._engine.start_next(prompts, sampling)

    def wait(self) -> None:
        self._engine.wait()

    def wait_for_receivers(self) -> None:
        self._engine.wait_for_receivers()

    def hold_memory(self, held: frozenset[str], *, may_start: bool) -> None:
        self._engine.hold_memory(held, may_start=may_start)

    def input_logprobs(self, input_ids: Sequence[int]) -> dict[str, list[float]]:
        return self._engine.input_logprobs(input_ids)

    def distrust(self, url: str) -> None:
        self._engine.distrust(url)

    def take_metrics(self, batch_name: str) -> dict[str, float]:
        return self._engine.take_metrics(batch_name)

    def close(self) -> None:
        self._engine.close()
