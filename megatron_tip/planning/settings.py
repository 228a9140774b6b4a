"""Checks that settings fit each other and the models; they read no files."""

from collections.abc import Mapping

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.selection import Selector, rollout_budget
from megatron_tip.teachers.setup import known_statistics, teacher_in_words, teacher_kind


def check_settings(config: Config, positions: Mapping[str, int]) -> None:
    """Refuses lengths, schedules and sampling settings that do not fit each other or the models.

    Args:
        positions: maximum tokens of a sequence, for "student" and "teacher".
    """
    _check_passes(config)
    for owner, limit in positions.items():
        if config.longest_sequence > limit:
            raise ConfigError(
                f"prompts.max_prompt_tokens + rollout.max_response_tokens: expected at most the {owner}'s "
                f"max_position_embeddings {limit}, got {config.longest_sequence}; shorten one of them"
            )
    _check_schedule(config)
    _check_sampling(config)
    _check_memory(config)
    if config.model.sequence_parallel and config.model.tensor_parallel_size == 1:
        raise ConfigError("model.sequence_parallel: expected model.tensor_parallel_size above 1, got 1; turn it off")
    _check_layers(config)
    if config.diagnostics.every_steps:
        check_whole_teacher(config)


def check_whole_teacher(config: Config) -> None:
    """Refuses a fixed-context diagnostic with a teacher behind servers."""
    if "forward_kl" not in known_statistics(config):
        raise ConfigError(
            f'diagnostics: expected teacher.kind = "megatron", got {config.teacher.kind!r}; KL(teacher || student) '
            "needs the whole distribution of the teacher"
        )


def make_selector(config: Config) -> Selector:
    """Returns the configured selector.

    Raises:
        ConfigError: its settings are invalid, or its budget keeps no token even of the longest response.
    """
    selection = config.selection
    try:
        selector = Selector(seed=config.run.seed, **selection.settings())
    except ConfigError as error:  # it names the setting without its section
        raise ConfigError(f"selection.{error}") from error
    longest = config.rollout.max_response_tokens
    if (
        selector.resolved_scope == "rollout"
        and not selector.keeps_all
        and not rollout_budget(selection.retention_ratio, longest, selection.minimum_per_rollout)
    ):
        raise ConfigError(
            f"selection.retention_ratio: expected at least one token of the longest response, got floor("
            f"{selection.retention_ratio} x {longest}) = 0 for every rollout; raise it or selection.minimum_per_rollout"
        )
    selector.check_available(known_statistics(config), teacher_in_words(config))
    return selector


def _check_layers(config: Config) -> None:
    for owner, model in (("model", config.model), ("teacher", config.teacher)):
        if model.transformer_impl == "transformer_engine" and model.dtype == "float32":
            raise ConfigError(
                f'{owner}.transformer_impl: expected "auto" or "local" with {owner}.dtype = "float32", got '
                '"transformer_engine", which has no attention for packed sequences in float32'
            )


def _check_schedule(config: Config) -> None:
    if config.optimizer.warmup_steps >= config.training.steps:
        raise ConfigError(
            f"optimizer.warmup_steps: expected fewer than training.steps = {config.training.steps}, "
            f"got {config.optimizer.warmup_steps}"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr: expected at most optimizer.lr = {config.optimizer.lr}, got {config.optimizer.min_lr}"
        )


def _check_sampling(config: Config) -> None:
    rollout, temperature = config.rollout, config.loss.temperature
    if config.loss.divergence == "sampled_token" and (rollout.temperature, rollout.top_p) != (temperature, 1.0):
        raise ConfigError(
            'loss.divergence = "sampled_token": expected rollout.temperature = loss.temperature and rollout.top_p = 1, '
            f"got {rollout.temperature}, {temperature} and {rollout.top_p}; its mean is the reverse KL only over "
            "tokens drawn from the student's own distribution"
        )
    if config.loss.divergence == "sampled_token" and not engine_kind(config).generates:
        raise ConfigError(
            'loss.divergence = "sampled_token": expected an engine that generates, got rollout.engine = "replay"; its '
            "gradient is that of the reverse KL only over tokens drawn from the student as it is"
        )
    if rollout.importance_cap and rollout.temperature != temperature:
        raise ConfigError(
            "rollout.importance_cap: expected rollout.temperature = loss.temperature, got "
            f"{rollout.temperature} and {temperature}; the ratio compares both distributions"
        )
    if rollout.importance_cap and rollout.top_p != 1.0:
        raise ConfigError(
            f"rollout.importance_cap: expected rollout.top_p = 1, got {rollout.top_p}; the engine's log-probabilities "
            "are then of the cut distribution and the trainer's of the whole one"
        )


def _check_memory(config: Config) -> None:
    """Refuses to give back memory that is in use all the time, and to move a teacher that is elsewhere."""
    if config.sglang.release_memory == "always" and config.rollout.ahead:
        raise ConfigError(
            'sglang.release_memory: expected "auto" or "never" with rollout.ahead = 1, got "always"; the servers '
            "generate while the student trains: set rollout.ahead = 0, or give them other GPUs (sglang.gpus)"
        )
    if config.sglang.release_memory == "always" and config.sglang.router_url:
        raise ConfigError(
            'sglang.release_memory: expected "auto" or "never" with sglang.router_url, got "always"; the router\'s '
            "health checks generate a token, which ends a server that has given back its memory"
        )
    if config.training.offload == "teacher" and not teacher_kind(config).has_weights:
        raise ConfigError(
            f'training.offload: expected "none", "optimizer" or "all" with teacher.kind = "{config.teacher.kind}", got '
            '"teacher", which is not in the trainer\'s processes'
        )


def _check_passes(config: Config) -> None:
    """Refuses one pass over several stages, none of which can hold what flows between them."""
    num_stages = config.model.pipeline_parallel_size
    if config.selection.passes == "one" and num_stages > 1:
        raise ConfigError(
            f'selection.passes = "one": expected model.pipeline_parallel_size = 1, got {num_stages}; set it to "auto" '
            'or "two"'
        )
