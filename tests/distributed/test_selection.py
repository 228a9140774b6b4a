"""The same batch selected without a group and at dp 1, 2 and 4: identical masks, weights and errors for every rule."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tip.errors import TrainingError
from megatron_tip.records import TokenSelection
from megatron_tip.selection import RULES, Selector
from tests.helpers.distributed import run_workers
from tests.helpers.selection import make_batch, settings_of, shard_rows, take_rows

LENGTHS = [17, 1, 40, 3, 0, 64, 2, 33, 12]
CASES = [
    (rule, scope, levels)
    for rule in sorted(RULES)
    for scope in sorted({"batch", "rollout", RULES[rule].scope})
    for levels in (None, 3)
]


def select(rows: torch.Tensor | None, rule: str, scope: str, levels: int | None, group=None) -> TokenSelection:
    statistics, index = make_batch(7, LENGTHS, levels=levels, gap=4)
    if rows is not None:
        statistics, index = take_rows(statistics, index, rows)
    selector = Selector(
        **settings_of(rule, 0.1),
        scope=scope,
        loss_scale="importance" if RULES[rule].take == "sample" else "selected",
        tie_break="random" if rule == "ta_opd_soft_or" else "token_order",
        compare=levels is None,
        seed=11,
    )
    return selector.select(statistics, index, step=4, dp_group=group)


def rows_of_this_rank() -> torch.Tensor:
    """Rollouts dealt at random; at dp 2 the first rank gets none."""
    index = make_batch(7, LENGTHS)[1]
    if dist.get_world_size() == 2:
        return torch.arange(len(index) if dist.get_rank() else 0)
    return shard_rows(index, dist.get_world_size())[dist.get_rank()]


def select_all_cases() -> list[tuple[torch.Tensor, TokenSelection]]:
    rows = rows_of_this_rank()
    return [(rows, select(rows, *case, group=dist.group.WORLD)) for case in CASES]


def select_within_a_subgroup() -> tuple[int, list[int]]:
    """Ranks 0 and 2 select together; ranks 1 and 3 hold the same rows again, as a second tensor-parallel rank does."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    statistics, index = make_batch(8, [6, 6])
    rows = (index.rollout_index == rank // 2).nonzero().flatten()
    selector = Selector(rule="ta_opd_divergence", retention_ratio=0.5)
    part = selector.select(*take_rows(statistics, index, rows), step=0, dp_group=groups[rank % 2])
    return part.num_valid, part.selection_mask.tolist()


def refusals() -> list[str]:
    """Rank 1 alone has a NaN; then no rank has a row; then rank 1 alone has an index that does not fit."""
    statistics, index = make_batch(7, [8])
    selector = Selector(rule="ta_opd_teachability", retention_ratio=0.5)
    group, is_second = dist.group.WORLD, dist.get_rank() == 1
    with_nan, _ = make_batch(7, [8])
    with_nan.support_divergence[2] = float("nan")
    negative = take_rows(statistics, index, torch.arange(8))[1]
    negative.position[0] = -1
    none = torch.arange(0)
    attempts = [
        (with_nan if is_second else statistics, index),
        take_rows(statistics, index, none),
        (statistics, negative if is_second else index),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(ValueError if attempt is attempts[2] else TrainingError) as caught:
            selector.select(*attempt, step=0, dp_group=group)
        messages.append(str(caught.value))
    return messages


def work() -> dict[str, Any]:
    """All that a rank does in one test session; a world is started once for each size."""
    outcome: dict[str, Any] = {"cases": select_all_cases()}
    if dist.get_world_size() == 2:
        return outcome | {"refusals": refusals()}
    return outcome | ({"subgroup": select_within_a_subgroup()} if dist.get_world_size() == 4 else {})


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """What every rank answers, by dp size."""
    folder = tmp_path_factory.mktemp("selection")
    return {dp_size: run_workers(work, dp_size, folder, timeout_seconds=200) for dp_size in (1, 2, 4)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_rule_is_equal_on_every_layout(case, worlds):
    whole = select(None, *case)
    for ranks in worlds.values():
        mask = torch.zeros_like(whole.selection_mask)
        answers = [rank["cases"][CASES.index(case)] for rank in ranks]
        for rows, part in answers:
            mask[rows] = part.selection_mask
            torch.testing.assert_close(part.row_weights, whole.row_weights[rows], rtol=0, atol=0)
            assert part.term_weights.keys() == whole.term_weights.keys()
            for name, weights in part.term_weights.items():
                torch.testing.assert_close(weights, whole.term_weights[name][rows], rtol=0, atol=0)
            assert (part.num_valid, part.num_selected) == (whole.num_valid, whole.num_selected)
            assert part.metrics == pytest.approx(whole.metrics, rel=1e-12)
            assert part.metrics == answers[0][1].metrics
        assert torch.equal(mask, whole.selection_mask)
        assert int(mask.sum()) == whole.num_selected


def test_tensor_parallel_ranks_select_alike(worlds):
    first, first_again, second, second_again = (rank["subgroup"] for rank in worlds[4])
    assert (first, second) == (first_again, second_again)
    assert (first[0], second[0]) == (12, 12)
    assert sum(first[1]) + sum(second[1]) == 6


def test_refusals_are_alike_on_all_ranks(worlds):
    messages, others = (rank["refusals"] for rank in worlds[2])
    assert messages == others
    assert "support_divergence" in messages[0]
    assert "no valid token" in messages[1]
    assert "replicas [1]" in messages[2]
