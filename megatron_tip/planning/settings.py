"""Checks that settings fit each other and the models; they read no files."""

from collections.abc import Mapping

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.errors import ConfigError
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.selection import Selector, rollout_budget
from megatron_tip.teachers.setup import known_statistics, teacher_in_words, teacher_kind
from megatron_tip.vocab_parallel.divergence import DIVERGENCES
from megatron_tip.vocab_parallel.topk_divergence import TOPK_DIVERGENCES


def check_settings(config: Config, positions: Mapping[str, int]) -> None:
    """Refuses lengths, schedules and sampling settings that do not fit each other or the models.

    Args:
        positions: maximum tokens of a sequence, for "student" and "teacher".
    """
    _check_passes(config)
    lengths = {"student": config.longest_sequence, "teacher": config.longest_teacher_sequence}
    for owner, limit in positions.items():
        if lengths[owner] > limit:
            setting = "max_teacher_prompt_tokens" if lengths[owner] != lengths["student"] else "max_prompt_tokens"
            raise ConfigError(
                f"prompts.{setting} + rollout.max_response_tokens: expected at most the {owner}'s "
                f"max_position_embeddings {limit}, got {lengths[owner]}; shorten one of them"
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
    if config.teacher.update != "frozen":
        raise ConfigError(
            f'diagnostics: expected a teacher that does not change, got teacher.update = "{config.teacher.update}"'
        )
    if "forward_kl" not in known_statistics(config):
        raise ConfigError(
            f'diagnostics: expected teacher.kind = "megatron", got {config.teacher.kind!r}; KL(teacher || student) '
            "needs the whole distribution of the teacher"
        )


def check_experts(config: Config, student: ModelArchitecture, grid: ModelGrid) -> None:
    """Refuses settings of the student's experts that it cannot have.

    Raises:
        ConfigError: tensor parallelism without sequence parallelism: every rank would send the same tokens to the
            experts, whose gradients would count them more than once. A pipeline stage without experts beside others
            that have some. Or an auxiliary loss without experts.
    """
    model = config.model
    if student.experts is None and model.moe_aux_loss_coeff:
        raise ConfigError(
            f"model.moe_aux_loss_coeff: expected 0 for a model without experts, got {model.moe_aux_loss_coeff}; "
            "unset it"
        )
    if student.experts is not None and model.tensor_parallel_size > 1 and not model.sequence_parallel:
        raise ConfigError(
            "model.sequence_parallel: expected true for a model with experts and tensor_parallel_size = "
            f"{model.tensor_parallel_size}, got false; set it, or use expert_model_parallel_size in its place"
        )
    if student.experts is not None:
        _check_stages(student, grid)


def _check_stages(student: ModelArchitecture, grid: ModelGrid) -> None:
    for stage, layers in enumerate(grid.layers_of_stages(student.num_layers)):
        if not any(map(student.has_experts, layers)):
            raise ConfigError(
                f"model.pipeline_layers: expected a layer with experts in every pipeline stage, got none in stage "
                f"{stage} (layers {layers[0]} to {layers[-1]}); Megatron-Core 0.16.1 cannot save the optimizer of such "
                "stages: choose other numbers of layers"
            )


def make_selector(config: Config) -> Selector:
    """Returns the configured selector.

    Raises:
        ConfigError: its settings are invalid, or its budget keeps no token even of the longest response.
    """
    selection = config.selection
    try:
        selector = Selector(seed=config.run.seed, steps=config.training.steps, **selection.settings())
    except ConfigError as error:  # it names the setting without its section
        raise ConfigError(f"selection.{error}") from error
    longest = config.rollout.max_response_tokens
    if (
        selector.resolved_scope == "rollout"
        and not selector.keeps_all
        and not rollout_budget(
            selection.retention_ratio, longest, selection.minimum_per_rollout, selector.resolved_rule.rounding
        )
    ):
        raise ConfigError(
            f"selection.retention_ratio: expected at least one token of the longest response, got floor("
            f"{selection.retention_ratio} x {longest}) = 0 for every rollout; raise it or selection.minimum_per_rollout"
        )
    selector.check_available(known_statistics(config), teacher_in_words(config))
    _check_losses(config, selector)
    return selector


def _check_losses(config: Config, selector: Selector) -> None:
    """Refuses losses other than those that the preset was published with, and constants beyond the support."""
    rule, size = selector.resolved_rule, config.selection.support_size
    if rule.divergence not in ("", config.loss.divergence):
        raise ConfigError(
            f'loss.divergence: expected "{rule.divergence}" with selection.rule = "{rule.name}", got '
            f'"{config.loss.divergence}"'
        )
    possible = DIVERGENCES if teacher_kind(config).has_weights else TOPK_DIVERGENCES
    terms = {term.divergence for term in rule.terms}
    if impossible := sorted(terms.difference(possible)):
        raise ConfigError(
            f"selection.rule: expected loss terms among {', '.join(possible)} with {teacher_in_words(config)}, got "
            f"{', '.join(impossible)} of rule {rule.name!r}"
        )
    if "sampled_token" in terms:
        _check_sampled_token(config, f"selection.rule = {rule.name!r}, with a term sampled_token")
    top = max((weight.constants["top"] for weight in rule.weights if "top" in weight.constants), default=0)
    if top > size:
        raise ConfigError(f"selection.support_size: expected at least {top:g} for rule {rule.name!r}, got {size}")


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
    if config.loss.divergence == "sampled_token":
        _check_sampled_token(config, 'loss.divergence = "sampled_token"')
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


def _check_sampled_token(config: Config, where: str) -> None:
    """Refuses the sampled-token loss over tokens that were not drawn from the student as it is."""
    rollout, temperature = config.rollout, config.loss.temperature
    if (rollout.temperature, rollout.top_p) != (temperature, 1.0):
        raise ConfigError(
            f"{where}: expected rollout.temperature = loss.temperature and rollout.top_p = 1, got "
            f"{rollout.temperature}, {temperature} and {rollout.top_p}; its mean is the reverse KL only over tokens "
            "drawn from the student's own distribution"
        )
    if not engine_kind(config).generates:
        raise ConfigError(
            f'{where}: expected an engine that generates, got rollout.engine = "replay"; its gradient is that of the '
            "reverse KL only over tokens drawn from the student as it is"
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
