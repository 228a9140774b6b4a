"""A check that a configuration still describes the run in its folder. Only a run with other steps imports torch."""

from typing import Any

from megatron_tip.config import Config
from megatron_tip.errors import CheckpointError, ConfigError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.training.checkpoints.files import CheckpointFiles

_DEFINING_KEYS: dict[str, tuple[str, ...]] = {
    "run": ("seed",),
    "model": ("path", "drop_layers", "dtype", "moe_aux_loss_coeff"),
    "teacher": ("kind", "path", "dtype", "update", "ema_decay", "student_support"),
    "prompts": (),
    "heldout": ("num_prompts", "every_steps", "verify"),
    "rollout": (
        *("prompts_per_step", "samples_per_prompt", "max_response_tokens", "temperature", "top_p", "dtype"),
        *("environment", "max_turns", "observation_role", "ahead", "importance_cap"),
    ),
    "selection": (
        *("rule", "retention_ratio", "scope", "normaliser", "tie_break", "minimum_per_rollout", "support_size"),
        *("loss_scale", "compare", "parameters", "adaptive_ratio"),
    ),
    "loss": ("divergence", "jsd_beta", "temperature"),
    "optimizer": (),
    "training": ("steps",),
}
"""Keys whose change makes it a different run; none named: all keys of the section.

Layouts, outputs, reports, and settings that affect only memory or time may change from one start to the next.
"""

_WITHOUT_SUCCESSOR = {"selection.scope": "micro_batch", "selection.thresholds": "last_step"}
"""Keys and values of earlier versions for tokens that no present setting selects."""

_STEPS = "training.steps"


def defining_settings(config: Config) -> dict[str, Any]:
    """Returns the keys and values that cannot change during a run, as JSON values."""
    values = config.model_dump(mode="json")
    return {
        f"{section}.{key}": values[section][key]
        for section, keys in _DEFINING_KEYS.items()
        for key in keys or values[section]
    }


def _is_extended(config: Config, saved_steps: int) -> bool:
    """Returns whether more steps than the run began with leave the steps before as they are."""
    return config.training.steps > saved_steps and not _why_not_longer(config)


def _why_not_longer(config: Config) -> str:
    """Returns why a run cannot take other steps than it began with, and what to do; empty if it can take more."""
    if config.optimizer.min_lr < config.optimizer.lr:
        why = "the learning rate falls to optimizer.min_lr over all steps; it can be extended where both are equal"
    elif config.prompts.source == "reasoning_gym" and not config.prompts.num_prompts:
        why = "as many prompts are generated as the run has steps for; it can be extended with prompts.num_prompts set"
    elif _rule_follows_training(config):
        why = f"the weights of rule {config.selection.rule!r} depend on how much of the training is done"
    else:
        return ""
    return f" ({why}; or let it end, and start a run with another run.folder from its student: model.path=.../hf)"


def _rule_follows_training(config: Config) -> bool:
    from megatron_tip.selection.rules import load_rule  # imports torch

    return load_rule(config.selection.rule).follows_training


def check_same_run(config: Config) -> None:
    """Refuses to continue a run with settings that make it a different run. Reads one small file.

    More steps than it began with make it no different run if learning rate, prompts and the rule's weights do not
    depend on their number.

    Raises:
        ConfigError: names the keys, with the checkpoint's values.
    """
    folder = RunFolder(config.run.folder)
    files = CheckpointFiles(folder.checkpoints)
    for step in reversed(files.steps()):
        try:
            saved = files.read_state(step)["settings"]
        except (CheckpointError, KeyError):
            continue  # damaged; `resume.newest_whole` will report it
        if gone := [f"{key} = {value!r}" for key, value in _WITHOUT_SUCCESSOR.items() if saved.get(key) == value]:
            raise ConfigError(
                f"run.folder: {folder.path} holds an unfinished run with {' and '.join(gone)}, which only earlier "
                'versions have; selection.passes = "one" replaced it and selects other tokens, so give another '
                "run.folder, or start over with --fresh, which removes the run"
            )
        wanted = defining_settings(config)
        changed = [
            f"{key}: {saved[key]!r}, now {value!r}{_why_not_longer(config) if key == _STEPS else ''}"
            for key, value in wanted.items()
            if key in saved and saved[key] != value and not (key == _STEPS and _is_extended(config, saved[key]))
        ]
        if changed:
            raise ConfigError(
                f"run.folder: {folder.path} holds an unfinished run with other settings; set them back, give "
                "another run.folder, or start over with --fresh, which removes it\n  " + "\n  ".join(changed)
            )
        return
