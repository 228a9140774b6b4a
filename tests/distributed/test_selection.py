"""The same batch selected at dp 1, 2 and 4: identical masks, weights and errors for every rule."""

import pytest
import torch
import torch.distributed as dist

from megatron_tip.errors import TrainingError
from megatron_tip.records import TokenSelection
from megatron_tip.selection import RULES, Selector
from tests.helpers.distributed import run_workers
from tests.helpers.selection import make_batch, shard_rows, take_rows

LENGTHS = [17, 1, 40, 3, 0, 64, 2, 33, 12]
CASES = [(rule, scope, levels) for rule in sorted(RULES) for scope in ("batch", "rollout") for levels in (None, 3)]


def select(rows: torch.Tensor | None, rule: str, scope: str, levels: int | None, group=None) -> TokenSelection:
    statistics, index = make_batch(7, LENGTHS, levels=levels)
    if rows is not None:
        statistics, index = take_rows(statistics, index, rows)
    selector = Selector(rule=rule, retention_ratio=1.0 if rule == "full" else 0.1, scope=scope, seed=11)
    return selector.select(statistics, index, step=4, dp_group=group)


def select_all_cases() -> list[tuple[torch.Tensor, TokenSelection]]:
    rows = shard_rows(make_batch(7, LENGTHS)[1], dist.get_world_size(), seed=dist.get_world_size())[dist.get_rank()]
    return [(rows, select(rows, *case, group=dist.group.WORLD)) for case in CASES]


@pytest.mark.parametrize("dp_size", [2, 4])
def test_every_rule_is_equal_on_every_layout(dp_size, tmp_path):
    per_rank = run_workers(select_all_cases, dp_size, tmp_path)
    for place, case in enumerate(CASES):
        whole = select(None, *case)
        mask = torch.zeros_like(whole.selection_mask)
        for rows, part in (outcomes[place] for outcomes in per_rank):
            mask[rows] = part.selection_mask
            torch.testing.assert_close(part.row_weights, whole.row_weights[rows], rtol=0, atol=0)
            assert (part.num_valid, part.num_selected) == (whole.num_valid, whole.num_selected)
            assert part.metrics == pytest.approx(whole.metrics, rel=1e-12)
            assert part.metrics == per_rank[0][place][1].metrics
        assert torch.equal(mask, whole.selection_mask), case
        assert int(mask.sum()) == whole.num_selected, case


def refusals() -> list[str]:
    """Rank 1 alone has a NaN; then no rank has a row."""
    statistics, index = make_batch(7, [8])
    if dist.get_rank() == 1:
        statistics.support_divergence[2] = float("nan")
    messages = []
    selector = Selector(rule="ta_opd_teachability", retention_ratio=0.5)
    for rows in (torch.arange(8), torch.arange(0)):
        with pytest.raises(TrainingError) as caught:
            selector.select(*take_rows(statistics, index, rows), step=0, dp_group=dist.group.WORLD)
        messages.append(str(caught.value))
    return messages


def test_refusals_are_alike_on_all_ranks(tmp_path):
    messages = run_workers(refusals, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "support_divergence" in messages[0][0]
    assert "no valid token" in messages[0][1]
