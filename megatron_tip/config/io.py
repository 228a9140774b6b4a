"""Reading and writing of configurations: TOML plus command-line overrides, and the printed reference of all keys."""

import difflib
import json
import textwrap
import tomllib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_tip.config import Config, Section
from megatron_tip.errors import ConfigError

_TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "text", Path: "path", list: "list", dict: "table"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


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
        lines = [_explain(detail, overridden) for detail in error.errors()]
        raise ConfigError("\n  ".join([f"{path}: the configuration cannot run", *lines])) from None


def dump_config(config: Config) -> str:
    """Returns `config` as TOML with every key; `load_config` reads an equal configuration from it."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def reference() -> str:
    """Returns every section and key with its type, default and description, as plain text."""
    blocks = [
        "Keys of CONFIG.toml. Each can be overridden as section.key=value; the value is read as TOML, bare words as "
        "text.\nRelative paths are relative to the current directory.\n"
    ]
    for name, section in _sections().items():
        blocks.append(f"[{name}]  {section.__doc__}\n")
        for key in _keys(name, section):
            head = f"  {key.name.partition('.')[2]}: {key.expected}, {key.default}"
            text = textwrap.fill(key.description, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
            blocks.append(f"{head}\n{text}\n")
    return "\n".join(blocks)


@dataclass(frozen=True)
class _Key:
    name: str
    expected: str
    default: str
    description: str


def _sections() -> dict[str, Any]:
    return {name: field.annotation for name, field in Config.model_fields.items()}


def _keys(section_name: str, section: type[Section]) -> Iterator[_Key]:
    for name, field in section.model_fields.items():
        yield _Key(f"{section_name}.{name}", _expected(field), _default(field), field.description or "")


def _all_keys() -> dict[str, _Key]:
    return {key.name: key for name, section in _sections().items() for key in _keys(name, section)}


def _expected(field: FieldInfo) -> str:
    """Returns what a field accepts, in words: `integer >= 1`, `"auto" | "float32"`, `list of integers`."""
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    return " ".join([_type_name(field.annotation), " and ".join(bounds)]).strip()


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f'"{choice}"' for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments if argument is not type(None))
    if origin is dict:
        return f"table of {_type_name(arguments[1])}s"
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}{'' if arguments[0] is str else 's'}"
    return _TYPE_NAMES[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "none by default"
    return f"default {json.dumps(field.default, default=str)}"


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
    if not (equals and dot and section and key) or "." in key:
        raise ConfigError(f"command line: expected section.key=value, got {override!r}")
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


_REPLACED = {"loss.compile": 'loss.kernels = "compiled" or "eager"'}
"""Keys of earlier versions, and what took their place."""


def _explain(detail: ErrorDetails, overridden: set[str]) -> str:
    """Returns one line about one pydantic error: key, expected value, actual value."""
    name = ".".join(str(part) for part in detail["loc"][:2])
    origin = " (on the command line)" if name in overridden else ""
    if detail["type"] == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        kind = "key" if "." in name else "section"
        return f"{name}{origin}: unknown {kind}{_nearest(name)}"
    if not name:  # no key's fault: pydantic's JSON parser refused the whole, as it does for numbers out of range
        return f"expected values that JSON can hold, got: {detail['msg']}"
    expected = f"section [{name}]" if name in _sections() else _all_keys()[name].expected
    got = "nothing" if detail["type"] == "missing" else _shown(detail["input"])
    element = "".join(f", element {part}" for part in detail["loc"][2:])
    return f"{name}{origin}{element}: expected {expected}, got {got}"


def _nearest(name: str) -> str:
    """Returns a hint at the existing key or section closest to `name`; keys of the same section come first."""
    if name in _REPLACED:
        return f"; use {_REPLACED[name]}"
    section, _, key = name.rpartition(".")
    by_key = {known.partition(".")[2]: known for known in _all_keys()}
    in_section = {known.partition(".")[2]: known for known in _all_keys() if known.startswith(f"{section}.")}
    sections = {known: known for known in _sections()}
    for names in (in_section, by_key) if section else (sections, by_key):
        if close := difflib.get_close_matches(key, names, n=1):
            return f"; did you mean {names[close[0]]}?"
    return "; see `megatron-tip train --help` for all keys"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({_TYPE_NAMES.get(type(value), type(value).__name__)})"
