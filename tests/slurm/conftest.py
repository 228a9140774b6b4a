"""One cluster and one pair of tiny models for all tests of the shipped scripts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm import SlurmCluster, missing_programs
from tests.helpers.training import RUN_TOML, make_models

LEAVES_NOTHING = """
[output]
save_checkpoint = false
export_hf = false
save_rollouts = false
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A SLURM of three nodes; skipped only where it is not installed."""
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def config_path(tmp_path: Path, models: Path) -> Path:
    """A run of three steps of some 0.1 s into `run` beside it."""
    path = tmp_path / "run.toml"
    path.write_text(RUN_TOML.format(folder=tmp_path / "run", models=models, threads=1) + LEAVES_NOTHING)
    return path
