"""From a configuration to a teacher behind SGLang servers: what it cannot do is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

from megatron_tip.config import Config
from megatron_tip.conversion.model_folder import read_json
from megatron_tip.errors import ConfigError
from megatron_tip.rollout.sglang.client import SGLangClient, Timeouts
from megatron_tip.rollout.sglang.setup import read_keys
from megatron_tip.selection import Selector
from megatron_tip.teachers.server_scorer import ScoringSettings, ServerTeacher
from megatron_tip.vocab_parallel.topk_divergence import TOPK_DIVERGENCES
from megatron_tip.vocab_parallel.topk_statistics import TOPK_STATISTICS


def check_teacher(config: Config, selector: Selector) -> None:
    """Refuses what the run's kind of teacher cannot do: losses, rules and temperatures by name. Reads no files.

    Raises:
        ConfigError: a loss or a rule that needs the teacher's whole distribution from one behind servers, a
            temperature other than 1 there, several teachers without a field that chooses; or the reverse.
    """
    teacher, loss = config.teacher, config.loss
    if teacher.kind == "megatron":
        if loss.divergence == "topk_reverse_kl":
            raise ConfigError(
                'loss.divergence = "topk_reverse_kl": expected teacher.kind = "sglang"; a teacher in the trainer\'s '
                'own processes gives its whole distribution: use "reverse_kl"'
            )
        if config.prompts.teacher_field:
            raise ConfigError('prompts.teacher_field: expected several teachers with teacher.kind = "sglang", got one')
        return
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
    asked = {"compatibility"} if teacher.student_support == "ask" else set()
    source = f'a teacher behind servers with teacher.student_support = "{teacher.student_support}"'
    selector.check_available(TOPK_STATISTICS | asked, source)
    _check_routes(config)


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


def build_server_teacher(config: Config, *, vocab_size: int) -> ServerTeacher:
    """Returns the teacher with its servers checked. `vocab_size`: ids that it shares with the student.

    Raises:
        ServerMismatchError, ServerError: a server that is something else or does not answer.
    """
    teacher = config.teacher
    keys = read_keys(teacher.keys_file, setting="teacher.keys_file")
    timeouts = Timeouts(silence=teacher.timeout_seconds)
    routes: dict[str, list[SGLangClient]] = {}
    for name, url in teacher.routes:
        client = SGLangClient(url, vocab_size=vocab_size, keys=keys, timeouts=timeouts)
        routes.setdefault(name, []).append(client)
    settings = ScoringSettings(
        vocab_size=vocab_size,
        support_size=min(config.selection.support_size, vocab_size),
        window_tokens=teacher.window_tokens,
        max_concurrent=teacher.max_concurrent,
        wait_seconds=teacher.wait_seconds,
    )
    scorer = ServerTeacher(routes, settings)
    scorer.check(asks_student_support=teacher.student_support == "ask")
    return scorer
