"""A simulated rank costs what a real one does: live bytes by phase, and the bytes of every message."""

from pathlib import Path

import pytest

from tests.helpers.distributed import run_workers
from tests.helpers.measured_rank import peaks_of, traffic_of
from tests.helpers.simulation import LAYOUTS, configured, measured, simulated
from tests.helpers.training import make_models


# `python -m tools.check_plan` compares the other layouts too, which takes longer.
@pytest.mark.parametrize("name", ["1x1x1", "2x1x2"])
@pytest.mark.timeout(900)
def test_a_simulated_rank_costs_what_a_real_one_does(name: str, tmp_path: Path):
    world_size, config = LAYOUTS[name].world_size, configured(name, make_models(tmp_path))
    real = run_workers(measured, world_size, tmp_path, config, timeout_seconds=600)
    for rank, (peaks, traffic, flops) in zip(simulated(config, world_size), real, strict=True):
        assert traffic_of(rank.ledger) == traffic
        assert sum(work.matrix_flops for work in rank.ledger.work.values()) == flops
        found = peaks_of(rank.ledger)
        assert peaks.keys() >= {"build", "teacher", "score", "select", "train", "sync"}
        for phase, num_bytes in peaks.items():
            assert found[phase] == pytest.approx(num_bytes, rel=0.1), phase
