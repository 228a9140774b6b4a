"""Questions and verifiers from reasoning-gym, which only this file imports."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tip.errors import ConfigError, InputError, OptionalDependencyError


@dataclass(frozen=True)
class Question:
    """A question of a task. `options`: what the task was made with. `entry`: what its verifier needs."""

    task: str
    options: Mapping[str, Any]
    entry: Mapping[str, Any]

    @property
    def text(self) -> str:
        return self.entry["question"]

    def score(self, answer: str) -> float:
        """Returns the score of the task's own verifier: 1 for a right answer, 0 to below 1 for another.

        Raises:
            InputError: the verifier fails on this entry or answer.
        """
        try:
            verifier = _verifier(self.task, json.dumps(dict(self.options), sort_keys=True))
            return float(verifier.score_answer(answer=answer, entry=self.entry))
        except ConfigError:
            raise
        except Exception as error:  # a verifier is other people's code over text that a model wrote
            raise InputError(
                f"the verifier of reasoning-gym's {self.task!r} fails with {type(error).__name__}: {error}; got the "
                f"answer {answer!r:.80} to {self.entry.get('question')!r:.80}"
            ) from error


def generate_questions(
    tasks: Sequence[str], num_questions: int, seed: int, options: Mapping[str, Any] | None = None
) -> list[Question]:
    """Returns `num_questions` questions, drawn from the named tasks in turn; deterministic in its arguments.

    Raises:
        OptionalDependencyError: reasoning-gym is not installed.
        ConfigError: reasoning-gym does not know one of the names, or a task does not take the options.
    """
    each, options = -(-num_questions // len(tasks)), options or {}
    datasets = [_dataset(task, each, seed, options) for task in tasks]
    places = [(i % len(tasks), i // len(tasks)) for i in range(num_questions)]
    return [Question(tasks[task], options, datasets[task][place]) for task, place in places]


def check_tasks(tasks: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raises what `generate_questions` would, without generating anything."""
    _library_with(tasks)
    for task in tasks:
        _dataset(task, 1, 0, options)


def _library_with(tasks: Sequence[str]) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise OptionalDependencyError(
            'prompts.source = "reasoning_gym" needs the package reasoning-gym, which is not installed; install '
            "megatron_tip[tasks]"
        ) from error
    known = reasoning_gym.factory.DATASETS
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ConfigError(
            f"prompts.tasks: expected names of reasoning-gym tasks, got {unknown}; known: {sorted(known)}"
        )
    return reasoning_gym


@functools.cache
def _verifier(task: str, options: str) -> Any:
    """Returns the task, of which one question is enough; some read word lists. `options`: as JSON."""
    return _dataset(task, 1, 0, json.loads(options))


def _dataset(task: str, size: int, seed: int, options: Mapping[str, Any]) -> Any:
    library = _library_with([task])
    try:
        return library.create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"task {task!r}: expected options that it takes (prompts.task_options), got {dict(options)}: {error}"
        ) from error
