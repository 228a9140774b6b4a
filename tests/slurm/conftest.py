"""One cluster and one pair of tiny models for all tests of the shipped scripts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm import SlurmCluster, missing_programs
from tests.helpers.training import make_models

TOML = """
[run]
folder = "{folder}"
threads = 1
[model]
path = "{models}/student"
drop_layers = [1, 4]
[teacher]
path = "{models}/student"
[prompts]
source = "reasoning_gym"
tasks = ["basic_arithmetic"]
max_prompt_tokens = 200
[heldout]
num_prompts = 2
[rollout]
prompts_per_step = 4
max_response_tokens = 12
[selection]
retention_ratio = 0.25
[optimizer]
lr = 1e-3
[training]
steps = 3
max_tokens_per_micro_batch = 300
[output]
save_checkpoint = false
export_hf = false
save_rollouts = false
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A two-node SLURM; skipped only where it is not installed."""
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
    path.write_text(TOML.format(folder=tmp_path / "run", models=models))
    return path
