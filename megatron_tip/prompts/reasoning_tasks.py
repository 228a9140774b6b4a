"""Questions from reasoning-gym, which only this file imports."""

from collections.abc import Sequence
from typing import Any

from megatron_tip.errors import ConfigError, OptionalDependencyError


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
