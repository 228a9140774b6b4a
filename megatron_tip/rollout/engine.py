"""What the training loop asks of a rollout engine; every engine lives behind this protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

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

    def for_step(self, step: int) -> SamplingParams:
        """The same parameters for training step `step` (counted from 1), with a seed of its own."""
        return replace(self, seed=derive_seed(self.seed, 1, step), batch_name=f"step_{step:06d}")

    def for_heldout(self, step: int) -> SamplingParams:
        """The same parameters for the held-out prompts after `step` steps: one sample, the same seed at every step."""
        return replace(self, samples_per_prompt=1, seed=derive_seed(self.seed, 2), batch_name=f"heldout_{step:06d}")


class RolloutEngine(Protocol):
    """Generates responses with the student's weights. Lives in the first process of the run."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns `samples_per_prompt` rollouts a prompt, prompt-major, tagged with the current weight version.

        An engine over servers leaves out samples that kept failing, and says so in its metrics.

        Raises:
            WeightsLostError: the weights are gone; after `update_weights` the same call goes on where it stopped.
            EngineError: the engine failed or answered with something other than rollouts.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Takes the student's weights as a stream of Hugging Face names and tensors; consumes it to its end.

        The stream is consumed even when a tensor is refused: its collectives hold other ranks.
        """
        ...

    def health(self) -> None:
        """Returns when the engine can generate; raises EngineError, saying what is wrong, when it cannot."""
        ...


@runtime_checkable
class ServedEngine(Protocol):
    """What an engine over servers can do beyond a RolloutEngine."""

    def input_logprobs(self, input_ids: Sequence[int]) -> dict[str, list[float]]:
        """By server that holds the last weights: the logprob of each id after the ids before it, without the first."""
        ...

    def distrust(self, url: str) -> None:
        """Has a server generate nothing until it got weights anew."""
        ...

    def take_metrics(self, batch_name: str) -> dict[str, float]:
        """What became of that batch, of the last sync, and of the servers so far."""
        ...

    def close(self) -> None:
        """Ends what the engine started."""
        ...
