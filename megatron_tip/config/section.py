"""The base of every section of the run configuration."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

MAX_SUPPORT_SIZE = 1024
"""The largest K of the top-K supports: comparing the ids of two supports takes K x K operations per token."""


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes after validation, field docstrings as descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _home_is_found(cls, value: Any) -> Any:
        """Returns `value`, a path that begins with ~ with the home folder in its place, as a shell does it."""
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError(f"{value}: expected a path whose home folder is known; {error}") from error
