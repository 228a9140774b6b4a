"""Every configuration that ships is one that loads."""

from pathlib import Path

import pytest

from megatron_tip.config.io import load_config

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("**/*.toml"))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_example_loads(path):
    load_config(path)
