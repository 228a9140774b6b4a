"""What grows with the ranks: the selection's messages hardly, what the first rank does in proportion."""

from pathlib import Path

import pytest

from megatron_tip.errors import ConfigError
from megatron_tip.simulation import scaling
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.scaling import scaling_lines, scaling_rows
from tests.helpers.training import Layout, make_config, make_models

pytestmark = pytest.mark.timeout(900)


def test_the_first_ranks_work_grows_with_the_world_and_a_ranks_selection_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scaling, "WORLD_SIZES", (8, 32))
    config = make_config(
        make_models(tmp_path),
        Layout(8, (2, 1), (2, 1)),
        rollout={"prompts_per_step": 8},
        optimizer={"distributed": True},
    )
    small, large = rows = list(scaling_rows(config, find_device("h800"), gpus_per_node=8))
    assert (small.world_size, small.dp_size, large.world_size, large.dp_size) == (8, 4, 32, 16)
    assert large.rollout_bytes == pytest.approx(4 * small.rollout_bytes, rel=0.05)
    assert large.num_prompts == 4 * small.num_prompts
    assert large.gathered_bytes == 4 * small.gathered_bytes == 16 * 2**24
    assert (small.num_sockets, large.num_sockets) == (7 + 3, 31 + 15)
    assert large.selection_bytes < 1.5 * small.selection_bytes
    assert large.checkpoint_bytes == small.checkpoint_bytes
    lines = list(scaling_lines(iter(rows)))
    assert max(map(len, lines)) <= 80
    assert lines[2].split()[:2] == ["8", "4"]


def test_layouts_that_fill_no_size_are_refused(tmp_path: Path):
    config = make_config(make_models(tmp_path), Layout(3, (3, 1), (3, 1)))
    with pytest.raises(ConfigError, match="--scaling: expected layouts that fill one of"):
        list(scaling_rows(config, find_device("h800"), gpus_per_node=8))
