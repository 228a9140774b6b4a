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


def test_experts_have_a_grid_of_their_own_over_the_same_stages():
    grid = ModelGrid.over(16, tp_size=2, pp_size=2, owner="student", ep_size=4, expert_tp_size=1)
    assert (grid.dp_size, grid.expert_dp_size, grid.stage_size) == (4, 2, 8)
    assert grid.expert_ranks()[1].tolist() == [[[8], [9], [10], [11]], [[12], [13], [14], [15]]]
    for rank in range(16):
        expert_tp, ep, expert_dp = grid.expert_coordinates(rank)
        assert grid.expert_ranks()[grid.coordinates(rank).pp, expert_dp, ep, expert_tp] == rank
    assert grid.sizes() == {"tp": 2, "pp": 2, "cp": 1, "dp": 4, "ep": 4, "expert_tp": 1}
    assert "ep" not in ModelGrid.over(4, tp_size=2, pp_size=2, owner="student").sizes()


@pytest.mark.parametrize(
    "tp_size,ep_size,expert_tp_size,expected",
    [(1, 1, 0, False), (2, 1, 0, False), (2, 1, 1, False), (2, 2, 1, False), (1, 2, 0, True), (2, 2, 0, True)],
)
def test_replicas_share_experts_that_one_of_them_does_not_hold(
    tp_size: int, ep_size: int, expert_tp_size: int, expected: bool
):
    grid = ModelGrid.over(8, tp_size=tp_size, pp_size=2, owner="m", ep_size=ep_size, expert_tp_size=expert_tp_size)
    assert grid.replicas_share_experts == expected


def test_a_stage_that_the_experts_do_not_fill_names_their_sizes():
    with pytest.raises(ConfigError, match=r"multiple of the experts' tp 2 x ep 4 = 8, got 4; .*expert_model_parallel"):
        ModelGrid.over(8, tp_size=2, pp_size=2, owner="teacher", ep_size=4)


def test_a_layout_in_words_names_what_is_not_even():
    plain = ModelGrid.over(8, tp_size=2, pp_size=2, owner="m")
    assert plain.in_words() == "tp 2 x pp 2 x dp 2"
    uneven = ModelGrid.over(8, tp_size=1, pp_size=2, owner="m", ep_size=2, pipeline_layers=(5, 3))
    assert uneven.in_words() == "tp 1 x pp 2 x dp 4 (experts tp 1 x ep 2 x dp 2) (5, 3 layers)"
