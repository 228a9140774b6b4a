"""Reading and writing of configurations: TOML plus command-line overrides."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_tip.config import Config
from megatron_tip.config.hints import key_hint, override_hint, value_hint
from megatron_tip.config.keys import TYPE_NAMES, all_keys
from megatron_tip.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration of a TOML file with `section.key=value` overrides applied.

    The value of an override is read as TOML, or as text if it is not TOML: `model.dtype=bfloat16` needs no quotes.
    Later overrides win. Relative paths in the file and in overrides are relative to the current directory.

    Raises:
        ConfigError: the file cannot be read, or keys are unknown, missing or of a wrong type; lists all of them.
    """
    values = _read_toml(Path(path))
    overridden = set()
    for override in overrides:
        section, key, value = _parse_override(override)
        if not isinstance(values.setdefault(section, {}), dict):
            raise ConfigError(f"{path}: {section}: expected a section [{section}], got {_shown(values[section])}")
        values[section][key] = value
        overridden.add(f"{section}.{key}")
    try:
        # Strict JSON mode refuses "3" as an integer, but accepts a text as a path and a list as a tuple.
        return Config.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(detail, overridden) for detail in error.errors())
        raise ConfigError("\n  ".join([f"{path}: the configuration cannot run", *lines])) from None


def dump_config(config: Config) -> str:
    """Returns `config` as TOML with every key; `load_config` reads an equal configuration from it."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return _checked_toml(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected TOML in UTF-8, got other bytes: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected TOML, got a syntax error: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key) or "." in key or name.startswith("-"):
        raise ConfigError(f"command line: expected section.key=value, got {override!r}{override_hint(override)}")
    try:
        parsed = _checked_toml(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return section, key, text
    except ValueError as error:
        raise ConfigError(
            f"command line: {name.strip()}: expected TOML, got a value that cannot be read: {error}"
        ) from None
    return section, key, parsed["value"] if parsed.keys() == {"value"} else text


def _checked_toml(text: str) -> dict[str, Any]:
    """Returns the content of `text`; raises ValueError for what tomllib cannot read, or for values nested too deep."""
    try:
        values = tomllib.loads(text)
        json.dumps(values, default=str)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    return values


def _explain(detail: ErrorDetails, overridden: set[str]) -> str:
    """Returns one line about one pydantic error: key, expected value, actual value."""
    name = ".".join(str(part) for part in detail["loc"][:2])
    origin = " (on the command line)" if name in overridden else ""
    if detail["type"] == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        kind = "key" if "." in name else "section"
        return f"{name}{origin}: unknown {kind}{key_hint(name)}"
    if not name:  # no key's fault: pydantic's JSON parser refused the whole, as it does for numbers out of range
        return f"expected values that JSON can hold, got: {detail['msg']}"
    key = all_keys().get(name)
    expected = key.expected if key else f"section [{name}]"
    if detail["type"] == "missing":
        return f"{name}{origin}: expected {expected}, got nothing"
    element = "".join(f", element {part}" for part in detail["loc"][2:3])  # the rest are choices of a type
    hint = value_hint(key, detail["input"]) if key and not element else ""
    return f"{name}{origin}{element}: expected {expected}, got {_shown(detail['input'])}{hint}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({TYPE_NAMES.get(type(value), type(value).__name__)})"
