"""The keys of a configuration in words: what each accepts, its default, its description."""

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_tip.config import Config, Section

TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "text", Path: "path", list: "list", dict: "table"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Key:
    """One key. `name`: "section.key". `expected`: what it accepts, in words. `choices`: its texts, if it has a few."""

    name: str
    expected: str
    default: str
    description: str
    choices: tuple[str, ...]
    is_list: bool

    @property
    def short_name(self) -> str:
        """The name within its section."""
        return self.name.partition(".")[2]


def sections() -> dict[str, type[Section]]:
    """Returns the sections by name, in the order of the configuration."""
    found: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    return found


def keys_of(section_name: str) -> Iterator[Key]:
    """Yields the keys of a section in their order."""
    for name, field in sections()[section_name].model_fields.items():
        yield Key(
            name=f"{section_name}.{name}",
            expected=_expected(field),
            default=_default(field),
            description=field.description or "",
            choices=get_args(field.annotation) if get_origin(field.annotation) is Literal else (),
            is_list=get_origin(field.annotation) is tuple,
        )


def all_keys() -> dict[str, Key]:
    """Returns all keys by "section.key"."""
    return {key.name: key for name in sections() for key in keys_of(name)}


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
        return f"table of {_type_name(arguments[1]).replace(' or ', 's or ')}s"
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}{'' if arguments[0] is str else 's'}"
    return TYPE_NAMES[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default in (None, Path()):
        return "none by default"
    return f"default {json.dumps(field.default)}"
