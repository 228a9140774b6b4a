"""Kinds of teachers by `teacher.kind`: what each one can do, checked before anything starts, and how it is built."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tip.config import Config
from megatron_tip.conversion.model_folder import read_json
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.rollout.sglang.setup import read_keys
from megatron_tip.selection import Selector
from megatron_tip.vocab_parallel.statistics import FULL_STATISTICS
from megatron_tip.vocab_parallel.topk_divergence import TOPK_DIVERGENCES
from megatron_tip.vocab_parallel.topk_statistics import TOPK_STATISTICS

if TYPE_CHECKING:
    from megatron_tip.teachers.teacher import Teacher, TeacherSite


def known_statistics(config: Config) -> frozenset[str]:
    """Returns the fields of TokenStatistics that the run's teacher makes known."""
    return TEACHER_KINDS[config.teacher.kind].known_statistics(config)


def build_teacher(config: Config, site: "TeacherSite") -> "Teacher[Any]":
    """Returns the teacher of the run. Collective over the world; raises as the `build` of its kind."""
    # Imported here: Megatron-Core takes seconds, and neither a dry run nor a submission needs it.
    return import_module(TEACHER_KINDS[config.teacher.kind].module).build(config, site)


def check_teacher(config: Config, selector: Selector, machine: Machine) -> None:
    """Refuses what the run's kind of teacher cannot do: losses, rules and temperatures by name. Reads files alone.

    Raises:
        ConfigError: a loss or a rule that needs the teacher's whole distribution from one behind servers, a
            temperature other than 1 there, several teachers without a field that chooses; or the reverse.
    """
    TEACHER_KINDS[config.teacher.kind].check(config, selector, machine)


def _check_in_trainer(config: Config, selector: Selector, machine: Machine) -> None:
    if config.loss.divergence == "topk_reverse_kl":
        raise ConfigError(
            'loss.divergence = "topk_reverse_kl": expected teacher.kind = "sglang"; a teacher in the trainer\'s own '
            'processes gives its whole distribution: use "reverse_kl"'
        )
    if config.prompts.teacher_field:
        raise ConfigError('prompts.teacher_field: expected several teachers with teacher.kind = "sglang", got one')


def _check_served(config: Config, selector: Selector, machine: Machine) -> None:
    teacher, loss = config.teacher, config.loss
    if loss.temperature != 1.0:
        raise ConfigError(
            f'loss.temperature: expected 1 with teacher.kind = "sglang", got {loss.temperature}; SGLang gives the '
            "log-probabilities of a prompt's tokens, by which the teacher scores, at temperature 1 whatever is asked"
        )
    if loss.divergence not in TOPK_DIVERGENCES:
        raise ConfigError(
            f'loss.divergence: expected one of {", ".join(TOPK_DIVERGENCES)} with teacher.kind = "sglang", got '
            f'"{loss.divergence}", which needs the teacher\'s whole distribution; servers give its top-K'
        )
    source = f'a teacher behind servers with teacher.student_support = "{teacher.student_support}"'
    selector.check_available(known_statistics(config), source)
    _check_routes(config)
    if teacher.keys_file is not None and machine.has(teacher.keys_file, "teacher.keys_file"):
        read_keys(teacher.keys_file, setting="teacher.keys_file")


def _check_routes(config: Config) -> None:
    routes = config.teacher.routes
    bad = [url for _, url in routes if not url.startswith(("http://", "https://"))]
    if bad:
        raise ConfigError(f'teacher.urls: expected "http://host:port" or "name=http://host:port", got {bad[0]!r}')
    named, field = any(name for name, _ in routes), config.prompts.teacher_field
    if named != bool(field):
        raise ConfigError(
            f"prompts.teacher_field: expected the field that names each prompt's teacher where teacher.urls has names, "
            f"and only there, got {field!r} and {', '.join(config.teacher.urls)}"
        )
    if field and config.prompts.source != "file":
        raise ConfigError(f'prompts.teacher_field: expected prompts.source = "file", got "{config.prompts.source}"')


def teacher_limits(folder: Path) -> tuple[int, int]:
    """Returns vocabulary and positions from `folder`'s config.json, which may be of any architecture; no weights.

    Raises:
        WeightsError: no config.json that can be read.
        ConfigError: it lacks one of them.
    """
    content = read_json(folder / "config.json")
    content |= content.get("text_config") or {}
    found = [content.get(key) for key in ("vocab_size", "max_position_embeddings")]
    if not all(type(value) is int for value in found):
        raise ConfigError(f"{folder}/config.json: expected vocab_size and max_position_embeddings, got {found}")
    vocab_size, num_positions = (int(value or 0) for value in found)
    return vocab_size, num_positions


def _known_in_trainer(config: Config) -> frozenset[str]:
    return FULL_STATISTICS


def _known_of_servers(config: Config) -> frozenset[str]:
    return TOPK_STATISTICS | ({"compatibility"} if config.teacher.student_support == "ask" else set())


@dataclass(frozen=True)
class TeacherKind:
    """One kind of teacher.

    `check`: refuses what it cannot do, from the configuration, the run's selector and files of the machine.
    `known_statistics`: the fields of TokenStatistics that it makes known. `module`: has its class and
    `build(config, site)`.
    """

    check: Callable[[Config, Selector, Machine], None]
    known_statistics: Callable[[Config], frozenset[str]]
    module: str


TEACHER_KINDS = {
    "megatron": TeacherKind(_check_in_trainer, _known_in_trainer, "megatron_tip.teachers.megatron"),
    "sglang": TeacherKind(_check_served, _known_of_servers, "megatron_tip.teachers.served"),
}
"""`teacher.kind` -> what is known of it."""
