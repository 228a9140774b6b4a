"""What a plan simulates: everything but what `check_simulated` refuses."""

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError


def check_simulated(config: Config) -> None:
    """Refuses a run with a part that the simulation lacks.

    Raises:
        ConfigError: names the setting.
    """
    for setting, expected, got in _unsupported(config):
        raise ConfigError(
            f"{setting}: expected {expected} for a plan, got {got}, which it does not simulate; `megatron-tip train "
            "CONFIG.toml --dry-run` estimates the memory of such a run by formulas"
        )


def _unsupported(config: Config) -> list[tuple[str, str, str]]:
    """Returns the settings, what a plan expects of each, and what came."""
    teacher, found = config.teacher, []
    if teacher.kind == "sglang":
        found.append(("teacher.kind", '"megatron" or "self"', f'"{teacher.kind}"'))
    if config.optimizer.use_precision_aware_optimizer:
        found.append(("optimizer.use_precision_aware_optimizer", "false", "true"))
    if teacher.fp8 != "none":
        found.append(("teacher.fp8", '"none"', f'"{teacher.fp8}"'))
    return found
