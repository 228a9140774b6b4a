"""The base of every section of the run configuration."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes after validation, field docstrings as descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
