"""Every configuration that ships is one that loads."""

from pathlib import Path

import pytest

from megatron_tip.commands.sweep_runs import load_sweep, runs_of
from megatron_tip.config.io import load_config

ROOT = Path(__file__).parents[2]
SWEEPS = sorted(ROOT.glob("examples/**/sweep.toml"))
EXAMPLES = sorted(set(ROOT.glob("examples/**/*.toml")) - set(SWEEPS))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_example_loads(path):
    load_config(path)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_every_run_of_an_example_sweep_can_be_configured(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = runs_of(load_sweep(path))
    assert len({run.config().run.folder for run in runs}) == len(runs) > 1
