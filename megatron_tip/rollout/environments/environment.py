"""What a multi-turn rollout asks of an environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_tip.records import Prompt


@dataclass(frozen=True)
class Observation:
    """What an environment says to a turn of the student. `done`: the episode is over; the text is then not shown."""

    text: str
    done: bool


class Environment(Protocol):
    """One episode at a time; every rollout of a batch has an environment of its own.

    What an environment answers should follow from the prompt and the student's turns alone: rollouts can then be
    generated anew, and a run with the same seed is the same run.
    """

    def reset(self, prompt: Prompt) -> None:
        """Begins an episode. The prompt is the student's first input; the environment adds nothing to it."""
        ...

    def step(self, text: str) -> Observation:
        """Takes one finished turn of the student, without its stop token, and answers.

        What it raises ends the run: a tool that can fail says so in its observation.
        """
        ...


EnvironmentFactory = Callable[[], Environment]
