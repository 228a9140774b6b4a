"""A check that a configuration still describes the run in its folder. Free of torch."""

from typing import Any

from megatron_tip.config import Config
from megatron_tip.errors import CheckpointError, ConfigError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.training.checkpoints.files import CheckpointFiles

_DEFINING_KEYS: dict[str, tuple[str, ...]] = {
    "run": ("seed",),
    "model": ("path", "drop_layers", "dtype", "moe_aux_loss_coeff"),
    "teacher": ("kind", "path", "dtype", "student_support"),
    "prompts": (),
    "heldout": ("num_prompts", "every_steps"),
    "rollout": (
        *("prompts_per_step", "samples_per_prompt", "max_response_tokens", "temperature", "top_p", "dtype"),
        *("environment", "max_turns", "observation_role", "ahead", "importance_cap"),
    ),
    "selection": (),
    "loss": ("divergence", "jsd_beta", "temperature"),
    "optimizer": (),
    "training": ("steps",),
}
"""Keys whose change makes it a different run; none named: all keys of the section.

Layouts, outputs, reports, and settings that affect only memory or time may change from one start to the next.
"""


def defining_settings(config: Config) -> dict[str, Any]:
    """Returns the keys and values that cannot change during a run, as JSON values."""
    values = config.model_dump(mode="json")
    keys_of = dict(_DEFINING_KEYS)
    if config.selection.scope == "micro_batch":  # rows that share a micro-batch share a budget
        keys_of["training"] += ("max_tokens_per_micro_batch",)
    return {
        f"{section}.{key}": values[section][key] for section, keys in keys_of.items() for key in keys or values[section]
    }


def check_same_run(config: Config) -> None:
    """Refuses to continue a run with settings that make it a different run. Reads one small file.

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
        wanted = defining_settings(config)
        changed = [
            f"{key}: {saved[key]!r}, now {value!r}"
            for key, value in wanted.items()
            if key in saved and saved[key] != value
        ]
        if changed:
            raise ConfigError(
                f"run.folder: {folder.path} holds an unfinished run with other settings; set them back, give "
                "another run.folder, or start over with --fresh, which removes it\n  " + "\n  ".join(changed)
            )
        return
