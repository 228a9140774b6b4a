"""The base of every section of the run configuration."""

from pydantic import BaseModel, ConfigDict

MAX_SUPPORT_SIZE = 1024
"""The largest K of the top-K supports: comparing the ids of two supports takes K x K operations per token."""


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes after validation, field docstrings as descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
