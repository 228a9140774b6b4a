"""The interface of an environment for multi-turn rollouts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_tip.records import Prompt


@dataclass(frozen=True)
class Observation:
    """An environment's answer to a turn of the student. `done`: the episode is over; the text is then not shown."""

    text: str
    done: bool


class Environment(Protocol):
    """An environment that runs one episode at a time; every rollout of a batch has its own.

    Its answers should depend only on the prompt and the student's turns: rollouts can then be regenerated, and runs
    with the same seed are the same.
    """

    def reset(self, prompt: Prompt) -> None:
        """Begins an episode. The prompt is the student's first input; the environment adds nothing to it."""
        ...

    def step(self, text: str) -> Observation:
        """Takes one finished turn of the student, without its stop token, and answers.

        An exception ends the run: a tool that can fail should say so in its observation.
        """
        ...


EnvironmentFactory = Callable[[], Environment]
