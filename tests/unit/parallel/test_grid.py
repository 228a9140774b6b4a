"""Coordinates of ranks in a layout, and layouts that do not fit."""

import pytest

from megatron_tip.errors import ConfigError
from megatron_tip.parallel.grid import ModelGrid


def test_tp_varies_fastest_and_pp_slowest():
    grid = ModelGrid.over(12, tp_size=2, pp_size=3, owner="student")
    assert grid.dp_size == 2
    assert grid.ranks().tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    for rank in range(12):
        tp, dp, pp = grid.coordinates(rank)
        assert grid.rank_at(tp=tp, dp=dp, pp=pp) == rank
        assert grid.ranks()[pp, dp, tp] == rank


def test_world_that_does_not_fit_names_model_and_sizes():
    with pytest.raises(ConfigError, match=r"teacher: .*multiple of tp 2 x pp 3 = 6, got 4; .*tensor_parallel_size"):
        ModelGrid.over(4, tp_size=2, pp_size=3, owner="teacher")
