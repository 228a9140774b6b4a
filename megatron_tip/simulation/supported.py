"""What a plan simulates: everything but what `check_simulated` refuses."""

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.planning.plan import Outline


def check_simulated(config: Config, outline: Outline) -> None:
    """Refuses a run with a part that the simulation lacks.

    Raises:
        ConfigError: names the setting.
    """
    for setting, expected, got in _unsupported(config, outline):
        raise ConfigError(
            f"{setting}: expected {expected} for a plan, got {got}, which it does not simulate; `megatron-tip train "
            "CONFIG.toml --dry-run` estimates the memory of such a run by formulas"
        )


def _unsupported(config: Config, outline: Outline) -> list[tuple[str, str, str]]:
    """Returns the settings, what a plan expects of each, and what came."""
    prompts, teacher, found = config.prompts, config.teacher, []
    if teacher.kind != "megatron":
        found.append(("teacher.kind", '"megatron"', f'"{teacher.kind}"'))
    own_prompt = ("teacher_prompt_field", "teacher_system_prompt", "teacher_template_arguments")
    found += [(f"prompts.{name}", "none", str(getattr(prompts, name))) for name in own_prompt if getattr(prompts, name)]
    if config.rollout.environment:
        found.append(("rollout.environment", "none", config.rollout.environment))
    for owner, grid in (("model", outline.student_grid), ("teacher", outline.teacher_grid)):
        if grid.cp_size > 1:
            found.append((f"{owner}.context_parallel_size", "1", str(grid.cp_size)))
    for owner, model in (("model", outline.student), ("teacher", outline.teacher)):
        if model and model.architecture.experts:
            found.append((f"{owner}.path", "a model without experts", "one with them"))
    if config.optimizer.use_precision_aware_optimizer:
        found.append(("optimizer.use_precision_aware_optimizer", "false", "true"))
    if teacher.fp8 != "none":
        found.append(("teacher.fp8", '"none"', f'"{teacher.fp8}"'))
    return found
