"""Questions and verifiers from reasoning-gym, which only this file imports."""

from collections.abc import Sequence
from typing import Any

from megatron_tip.errors import ConfigError, InputError, OptionalDependencyError


def generate_questions(tasks: Sequence[str], num_questions: int, seed: int) -> list[str]:
    """Returns `num_questions` questions, drawn from the named tasks in turn; deterministic in its arguments.

    Raises:
        OptionalDependencyError: reasoning-gym is not installed.
        ConfigError: reasoning-gym does not know one of the names.
    """
    reasoning_gym = _library_with(tasks)
    datasets = [reasoning_gym.create_dataset(task, size=-(-num_questions // len(tasks)), seed=seed) for task in tasks]
    return [datasets[i % len(tasks)][i // len(tasks)]["question"] for i in range(num_questions)]


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises what `generate_questions` would, without generating anything."""
    _library_with(tasks)


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


def generate_entries(task: str, num_entries: int, seed: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns entries of one task: question, answer and what its verifier needs; deterministic in the arguments.

    Raises:
        ConfigError: the task is unknown, or its options do not fit.
    """
    dataset = _dataset(task, num_entries, seed, options)
    return [dataset[place] for place in range(num_entries)]


def score_answer(task: str, options: dict[str, Any], entry: dict[str, Any], answer: str) -> float:
    """Returns the score of the task's own verifier: 1 for a right answer, 0 to below 1 for another.

    Raises:
        InputError: the verifier fails on this entry or answer.
    """
    try:
        return float(_dataset(task, 1, 0, options).score_answer(answer=answer, entry=entry))
    except ConfigError:
        raise
    except Exception as error:  # a verifier is other people's code over text that a model wrote
        raise InputError(
            f"the verifier of reasoning-gym's {task!r} fails with {type(error).__name__}: {error}; got the answer "
            f"{answer!r:.80} to {entry.get('question')!r:.80}"
        ) from error


def _dataset(task: str, size: int, seed: int, options: dict[str, Any]) -> Any:
    library = _library_with([task])
    try:
        return library.create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"task {task!r}: expected options that it takes, got {options}: {error}") from error
