"""The kinds of teachers by `teacher.kind`: early checks of what each supports, and its construction."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_folder import read_json
from megatron_tip.conversion.not_a_model import require_model_folder
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.rollout.sglang.keys import read_keys
from megatron_tip.vocab_parallel.statistics import FULL_STATISTICS
from megatron_tip.vocab_parallel.topk_divergence import TOPK_DIVERGENCES
from megatron_tip.vocab_parallel.topk_statistics import ON_STUDENT_SUPPORT, TOPK_STATISTICS

if TYPE_CHECKING:
    from megatron_tip.teachers.teacher import Teacher, TeacherSite


def splits_sequence(config: Config, teacher: ModelArchitecture) -> bool:
    """Returns whether a teacher in the trainer's own processes splits sequences over its tensor-parallel ranks.

    With experts it must: otherwise every tensor-parallel rank would send all tokens to them. One that follows the
    student does as the student.
    """
    if config.teacher.update != "frozen":
        return config.model.sequence_parallel
    return teacher.experts is not None


def known_statistics(config: Config) -> frozenset[str]:
    """Returns the fields of TokenStatistics that the run's teacher can provide."""
    return teacher_kind(config).known_statistics(config)


def teacher_kind(config: Config) -> "TeacherKind":
    """Returns the row of the configuration's teacher."""
    return TEACHER_KINDS[config.teacher.kind]


def teacher_in_words(config: Config) -> str:
    """Returns what messages call the run's teacher."""
    asked = f' with teacher.student_support = "{config.teacher.student_support}"'
    return f'teacher.kind = "{config.teacher.kind}"' + (asked if config.teacher.kind == "sglang" else "")


def build_teacher(config: Config, site: "TeacherSite") -> "Teacher[Any]":
    """Builds the run's teacher. Collective over the world; raises what `build` of its kind raises."""
    # Imported here: Megatron-Core takes seconds, and neither a dry run nor a submission needs it.
    return import_module(teacher_kind(config).module).build(config, site)


def check_teacher(config: Config, machine: Machine) -> None:
    """Rejects losses, rules and temperatures that the run's kind of teacher does not support. Reads only files.

    Raises:
        ConfigError: with a teacher behind servers, a loss or rule that needs its whole distribution, or a temperature
            other than 1; a loss for the top-K only with another teacher; several teachers without a field that
            chooses between them, or the reverse.
    """
    teacher_kind(config).check(config, machine)


def _check_in_trainer(config: Config, machine: Machine) -> None:
    if config.loss.divergence == "topk_reverse_kl":
        raise ConfigError(
            'loss.divergence = "topk_reverse_kl": expected teacher.kind = "sglang"; a teacher in the trainer\'s own '
            'processes gives its whole distribution: use "reverse_kl"'
        )
    if config.prompts.teacher_field:
        raise ConfigError('prompts.teacher_field: expected several teachers with teacher.kind = "sglang", got one')


def _check_served(config: Config, machine: Machine) -> None:
    teacher, loss = config.teacher, config.loss
    if loss.temperature != 1.0:
        raise ConfigError(
            f'loss.temperature: expected 1 with teacher.kind = "sglang", got {loss.temperature}; SGLang gives the '
            "log-probabilities of a prompt's tokens, by which the teacher scores, at temperature 1 only"
        )
    if loss.divergence not in TOPK_DIVERGENCES:
        raise ConfigError(
            f'loss.divergence: expected one of {", ".join(TOPK_DIVERGENCES)} with teacher.kind = "sglang", got '
            f'"{loss.divergence}", which needs the teacher\'s whole distribution; servers give only its top-K'
        )
    if teacher.context_parallel_size > 1:
        raise ConfigError(
            f'teacher.context_parallel_size: expected 1 with teacher.kind = "sglang", got '
            f"{teacher.context_parallel_size}; servers share a teacher by teacher.tensor_parallel_size alone"
        )
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
    """Returns vocabulary size and number of positions from `folder`'s config.json, for any architecture; no weights.

    Raises:
        WeightsError: it is no model's folder, or config.json cannot be read.
        ConfigError: one of the two values is missing.
    """
    require_model_folder(folder)
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
    return TOPK_STATISTICS | (ON_STUDENT_SUPPORT if config.teacher.student_support == "ask" else set())


@dataclass(frozen=True)
class TeacherKind:
    """One kind of teacher.

    `check`: rejects what it does not support, given the configuration and the machine's files.
    `known_statistics`: the fields of TokenStatistics that it can provide. `module`: the module with its class and
    `build(config, site)`. `has_weights`: the run loads its weights; otherwise `teacher.path` only describes it.
    """

    check: Callable[[Config, Machine], None]
    known_statistics: Callable[[Config], frozenset[str]]
    module: str
    has_weights: bool


def _check_self(config: Config, machine: Machine) -> None:
    _check_in_trainer(config, machine)
    update, prompts = config.teacher.update, config.prompts
    if update == "live" and not prompts.teacher_reads_another:
        raise ConfigError(
            'teacher.update = "live": expected a prompt of the teacher\'s own (prompts.teacher_prompt_field, '
            "teacher_system_prompt or teacher_template_arguments), got none: the student would always agree with itself"
        )
    if update != "frozen" and config.training.offload in ("teacher", "all"):
        raise ConfigError(
            f'training.offload: expected "none" or "optimizer" with teacher.update = "{update}", got '
            f"\"{config.training.offload}\"; the teacher's weights are the student's or follow them"
        )


TEACHER_KINDS = {
    "megatron": TeacherKind(_check_in_trainer, _known_in_trainer, "megatron_tip.teachers.megatron", has_weights=True),
    "self": TeacherKind(_check_self, _known_in_trainer, "megatron_tip.teachers.own", has_weights=True),
    "sglang": TeacherKind(_check_served, _known_of_servers, "megatron_tip.teachers.served", has_weights=False),
}
"""`teacher.kind` -> the kind."""
