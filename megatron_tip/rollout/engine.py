"""What the training loop asks of a rollout engine, and what an engine is built from."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_tip.config import Config
from megatron_tip.conversion.model_folder import ModelFolder
from megatron_tip.records import Prompt, Rollout
from megatron_tip.seeds import derive_seed

FINISH_REASONS = ("stop", "length", "turns")


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled. `stop_token_ids` end a response and are kept as its last id.

    Every random choice of a call follows from `seed` and from the places in the list of prompts. `batch_name` says
    which batch of the run the call makes ("step_000001"); it is the name under which its rollouts are kept.
    """

    max_response_tokens: int
    temperature: float
    top_p: float
    samples_per_prompt: int
    stop_token_ids: tuple[int, ...]
    seed: int
    batch_name: str = ""

    def for_step(self, step: int) -> "SamplingParams":
        """Returns the same parameters for training step `step` (counted from 1), with a seed of its own."""
        return replace(self, seed=derive_seed(self.seed, 1, step), batch_name=f"step_{step:06d}")

    def for_heldout(self, step: int) -> "SamplingParams":
        """Returns those for the held-out prompts after `step` steps: one sample, the same seed at every step."""
        return replace(self, samples_per_prompt=1, seed=derive_seed(self.seed, 2), batch_name=f"heldout_{step:06d}")


@dataclass(frozen=True)
class EngineNeeds:
    """What engines are built from; each takes what it needs.

    `student`: as it is trained, without its dropped layers. `vocab_size`: ids that student and teacher share. `device`:
    of the first process. `num_threads`: CPU threads of all workers of this machine together, which an engine in the
    first process may use while the others wait for it. `dtype`: of the engine's weights. `weights_dtype`: of the
    student's parameters, as they come.
    """

    config: Config
    student: ModelFolder
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    device: torch.device
    num_threads: int
    dtype: torch.dtype
    weights_dtype: torch.dtype


class RolloutEngine(ABC):
    """Generates responses with the student's weights. Lives in the first process of the run.

    An engine implements the first three methods. The others have defaults that hold for one that generates only when
    it is asked to, within this process.
    """

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns `samples_per_prompt` rollouts per prompt, prompt-major, tagged with the current weight version.

        An engine over servers leaves out samples that kept failing, and counts them in its metrics.

        Raises:
            WeightsLostError: the weights are gone; after `update_weights` the same call continues where it stopped.
            EngineError: the engine failed or answered with something other than rollouts.
        """

    @abstractmethod
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Takes the student's weights as a stream of Hugging Face names and tensors; consumes it to its end.

        The stream is consumed even when a tensor is refused: its collectives hold other ranks.
        """

    @abstractmethod
    def health(self) -> None:
        """Returns when the engine can generate; raises EngineError, saying what is wrong, when it cannot."""

    def start_next(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:  # noqa: B027
        """Begins a batch that `generate` will be asked for, where the engine can work while the student trains."""

    def wait(self) -> None:  # noqa: B027
        """Returns when nothing is being generated."""

    def input_logprobs(self, input_ids: Sequence[int]) -> dict[str, list[float]]:
        """Returns, by server that holds the last weights, the logprob of each id but the first after those before it.

        Asked of engines with `EngineKind.verifies_weights`.
        """
        return {}

    def distrust(self, url: str) -> None:  # noqa: B027
        """Has a server generate nothing until it has received weights again."""

    def take_metrics(self, batch_name: str) -> dict[str, float]:
        """Returns what became of that batch, of the last sync, and of the servers so far."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Ends what the engine started."""


class EngineWrapper(RolloutEngine):
    """An engine that adds something to another one, `_engine`, and leaves the rest to it."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        return self._engine.generate(prompts, sampling)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        self._engine.update_weights(weights, weight_version)

    def health(self) -> None:
        self._engine.health()

    def start_next(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        self._engine.start_next(prompts, sampling)

    def wait(self) -> None:
        self._engine.wait()

    def input_logprobs(self, input_ids: Sequence[int]) -> dict[str, list[float]]:
        return self._engine.input_logprobs(input_ids)

    def distrust(self, url: str) -> None:
        self._engine.distrust(url)

    def take_metrics(self, batch_name: str) -> dict[str, float]:
        return self._engine.take_metrics(batch_name)

    def close(self) -> None:
        self._engine.close()
