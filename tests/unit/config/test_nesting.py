"""A configuration that nests deeper than pydantic's JSON parser follows, though Python's does."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError


def test_values_that_nest_too_deep_for_the_parser_end_in_a_message(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(f"[run]\nfolder = {'[' * 300}{']' * 300}\n")
    with pytest.raises(ConfigError, match=r"run\.toml: the configuration cannot run\n  expected values that JSON"):
        load_config(path)
