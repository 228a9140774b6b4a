"""What the training loop asks of a rollout engine; every engine lives behind this protocol."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_tip.records import Prompt, Rollout


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled. `stop_token_ids` end a response and are kept as its last id."""

    max_response_tokens: int
    temperature: float
    top_p: float
    samples_per_prompt: int
    stop_token_ids: tuple[int, ...]
    seed: int


class RolloutEngine(Protocol):
    """Generates responses with the student's weights. Lives in the first process of the run."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns `samples_per_prompt` rollouts a prompt, prompt-major, tagged with the current weight version.

        Raises:
            EngineError: the engine failed or answered with something other than rollouts.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Takes the student's weights as a stream of Hugging Face names and tensors; consumes it to its end."""
        ...

    def health(self) -> None:
        """Returns when the engine can generate; raises EngineError, saying what is wrong, when it cannot."""
        ...
