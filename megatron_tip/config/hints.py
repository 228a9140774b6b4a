"""Hints for messages about a configuration: what the user most likely meant."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from megatron_tip.config.keys import Key, all_keys, sections

_REPLACED = {
    "loss.compile": 'loss.kernels = "compiled" or "eager"',
    "selection.thresholds": 'selection.passes = "one", which selects exactly, by this step\'s scores',
    "model.recompute_granularity": "model.recompute_activations for whole layers, model.recompute_modules for parts",
    "optimizer.optimizer_cpu_offload": 'training.offload = "optimizer", which moves the optimizer\'s state',
}
"""Keys of earlier versions and of Megatron, and what takes their place."""

_OTHER_SECTIONS = {
    **dict.fromkeys(("student", "policy", "actor"), "model"),
    **dict.fromkeys(("data", "dataset", "datasets"), "prompts"),
    **dict.fromkeys(("train", "trainer"), "training"),
    **dict.fromkeys(("generation", "sampling", "sampling_params"), "rollout"),
    **dict.fromkeys(("wandb", "logging", "logger"), "tracking"),
}
"""What other programs call a section."""

_OTHER_KEYS = {
    **dict.fromkeys(("learning_rate", "max_lr"), "lr"),
    **dict.fromkeys(("tp", "tp_size", "tensor_model_parallel_size"), "tensor_parallel_size"),
    **dict.fromkeys(("pp", "pp_size", "pipeline_model_parallel_size"), "pipeline_parallel_size"),
    **dict.fromkeys(("cp", "cp_size"), "context_parallel_size"),
    **dict.fromkeys(("ep", "ep_size", "expert_parallel_size"), "expert_model_parallel_size"),
    **dict.fromkeys(("max_steps", "num_steps", "train_iters"), "steps"),
    **dict.fromkeys(("batch_size", "global_batch_size", "train_batch_size"), "prompts_per_step"),
    **dict.fromkeys(("num_generations", "n"), "samples_per_prompt"),
    **dict.fromkeys(("max_new_tokens", "max_tokens", "response_length", "max_response_length"), "max_response_tokens"),
    **dict.fromkeys(("budget", "ratio", "rho"), "retention_ratio"),
}
"""What other programs call a key."""

_REPLACED_VALUES = {
    ("selection.scope", "micro_batch"): 'selection.passes = "one", which selects exactly, among the whole batch',
}
"""Keys and values of earlier versions, and what took their place."""

_OTHER_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
"""What other programs call a choice."""

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def key_hint(name: str) -> str:
    """Returns a hint at the key or section that is closest to `name`, which does not exist."""
    if name in _REPLACED:
        return f"; use {_REPLACED[name]}"
    if name in _OTHER_SECTIONS:
        return f"; did you mean {_OTHER_SECTIONS[name]}?"
    section, _, key = name.rpartition(".")
    key = _OTHER_KEYS.get(key, key)
    by_key = {known.short_name: known.name for known in all_keys().values()}
    in_section = {known.short_name: known.name for known in all_keys().values() if known.name.startswith(f"{section}.")}
    first = (in_section, 0.6) if section else ({name: name for name in sections()}, 0.6)
    for names, cutoff in (first, (by_key, 0.8)):  # a key of another section has to be nearer
        if close := difflib.get_close_matches(key, names, n=1, cutoff=cutoff):
            return f"; did you mean {names[close[0]]}?"
    return "; see `megatron-tip train --help` for all keys"


def override_hint(text: str) -> str:
    """Returns a hint for a word on the command line that is no override: dashes, blanks, or a missing section."""
    name, equals, value = text.lstrip("-").partition("=")
    name, shown = name.strip(), f"={value.strip()}" if equals else "=VALUE"
    if name in all_keys():
        return f"; did you mean {name}{shown}? Write it without dashes and without blanks around the equals sign"
    name = _OTHER_KEYS.get(name, name)
    names = [known.name for known in all_keys().values() if known.short_name == name]
    if names:
        return f"; did you mean {' or '.join(f'{known}{shown}' for known in names[:4])}?"
    close = difflib.get_close_matches(name.rpartition(".")[2], [key.short_name for key in all_keys().values()], n=1)
    if close:
        return f"; did you mean {next(key.name for key in all_keys().values() if key.short_name == close[0])}{shown}?"
    return ""


def names_a_key(option: str) -> bool:
    """Returns whether an option, such as "--optimizer.lr=1e-4", has the name of a section's key, or looks like one."""
    name = option.lstrip("-").partition("=")[0]
    section, dot, _ = name.partition(".")
    return (bool(dot) and section in sections()) or any(name == key.short_name for key in all_keys().values())


def value_hint(key: Key, value: Any) -> str:
    """Returns a hint at the value that was most likely meant in the place of a refused one."""
    if isinstance(value, str) and (key.name, value) in _REPLACED_VALUES:
        return f"; use {_REPLACED_VALUES[key.name, value]}"
    meant = _meant(key, value)
    return "" if meant is None else f"; did you mean {json.dumps(meant, ensure_ascii=False)}?"


def _meant(key: Key, value: Any) -> Any:
    if key.choices and isinstance(value, str):
        return _nearest_choice(value, key.choices)
    if key.is_list and not isinstance(value, list | dict):
        return _as_list(key, value)
    if key.expected == "boolean" and not isinstance(value, list | dict):
        return _BOOLEANS.get(str(value).lower())
    if isinstance(value, float) and key.expected.startswith("integer") and value.is_integer():
        return int(value)
    if isinstance(value, str) and key.expected.startswith(("integer", "number")):
        number = _as_number(value)
        return int(number) if number is not None and number.is_integer() else number
    return None


def _nearest_choice(value: str, choices: Sequence[str]) -> str | None:
    other = _OTHER_NAMES.get(value.lower())
    if other in choices:
        return other
    by_name = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(value.lower().replace("-", "_"), by_name, n=1)
    return by_name[close[0]] if close else None


def _as_list(key: Key, value: Any) -> list[Any] | None:
    if key.expected == "list of text":
        return [part.strip() for part in value.split(",")] if isinstance(value, str) and value else None
    parts = str(value).split(",")
    numbers = [_as_number(part) for part in parts]
    if any(number is None for number in numbers):
        return None
    return [int(number) if number.is_integer() else number for number in numbers if number is not None]


def _as_number(text: str) -> float | None:
    """Returns the finite number that a text holds, if any."""
    try:
        number = float(text.strip().replace("_", "").replace(",", "."))
    except ValueError:
        return None
    return number if abs(number) < 1e300 else None
