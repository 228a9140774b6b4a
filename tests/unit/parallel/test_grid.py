"""Coordinates of ranks in a layout, and layouts that do not fit."""

import pytest

from megatron_tip.errors import ConfigError
from megatron_tip.parallel.grid import ModelGrid


def test_tp_varies_fastest_and_pp_slowest():
    grid = ModelGrid.over(12, tp_size=2, pp_size=3, owner="student")
    assert (grid.dp_size, grid.sequence_multiple) == (2, 1)
    assert grid.ranks()[:, :, 0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert_places(grid)


def test_cp_varies_after_tp():
    grid = ModelGrid.over(24, tp_size=2, pp_size=3, cp_size=2, owner="student")
    assert (grid.dp_size, grid.sequence_multiple) == (2, 4)
    assert grid.ranks()[1].tolist() == [[[8, 9], [10, 11]], [[12, 13], [14, 15]]]
    assert grid.in_words() == "tp 2 x pp 3 x cp 2 x dp 2"
    assert ModelGrid(2, 1, 4).in_words() == "tp 2 x pp 1 x dp 4"
    assert_places(grid)


def assert_places(grid: ModelGrid) -> None:
    for rank in range(grid.world_size):
        tp, cp, dp, pp = grid.coordinates(rank)
        assert grid.rank_at(tp=tp, cp=cp, dp=dp, pp=pp) == rank
        assert grid.ranks()[pp, dp, cp, tp] == rank


def test_world_that_does_not_fit_names_model_and_sizes():
    with pytest.raises(ConfigError, match=r"teacher: .*multiple of tp 2 x pp 3 = 6, got 4; .*tensor_parallel_size"):
        ModelGrid.over(4, tp_size=2, pp_size=3, owner="teacher")
    with pytest.raises(ConfigError, match=r"multiple of tp 2 x cp 2 x pp 1 = 4, got 6; .*context_parallel_size"):
        ModelGrid.over(6, tp_size=2, pp_size=1, cp_size=2, owner="student")
