"""What a step shows of its tokens, from the last stage to the first process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_tip.training.step import train_step
from tests.helpers.distributed import run_workers
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, make_rollouts

LENGTHS = [9, 4, 12, 7]


def view_rows(folder: Path, layout: Layout, selection: dict[str, Any], every: int) -> tuple[list[Any], dict[str, Any]]:
    tracking = {"view_every_steps": every, "view_samples": 2}
    config = make_config(folder, layout, selection={"support_size": 5, **selection}, tracking=tracking)
    run = build_tiny_run(config, make_rollouts(LENGTHS))
    metrics = train_step(run, 1)
    view = run.views.latest
    assert (view is not None) == (every == 1 and dist.get_rank() == 0)
    if view is None:
        return [], metrics
    return view.tokens.to_pylist(), metrics


@pytest.mark.parametrize(
    "layout, selection",
    [
        (Layout(2, (1, 2), (2, 1)), {"rule": "ta_opd_teachability"}),
        (Layout(2, (2, 1), (1, 2)), {"rule": "ta_opd_teachability", "passes": "one"}),
        (Layout(2), {"rule": "full", "retention_ratio": 1.0}),  # scored for the view alone
        (Layout(2, cp=(2, 1)), {"rule": "ta_opd_teachability"}),
        (Layout(2, cp=(2, 2)), {"rule": "ta_opd_teachability", "passes": "one"}),
    ],
    ids=["pipeline", "one_pass", "full_dp2", "parts", "one_pass_parts"],
)
def test_views_have_statistics_scores_and_both_supports(layout: Layout, selection: dict[str, Any], tmp_path: Path):
    models = make_models(tmp_path)
    rows, metrics = run_workers(view_rows, layout.world_size, tmp_path, models, layout, selection, 1)[0]
    plain = run_workers(view_rows, layout.world_size, tmp_path, models, layout, selection, 2)[0][1]
    assert metrics["train/loss"] == plain["train/loss"]
    assert len({row["rollout"] for row in rows}) == 2
    assert len(rows) == sum(LENGTHS[place] for place in {row["rollout"] for row in rows})
    for row in rows:
        assert row["valid"]
        assert row["selected"] or selection["rule"] != "full"
        assert (row["score"] is None) == (selection["rule"] == "full")
        for model in ("student", "teacher"):
            ids, logprobs = row[f"{model}_support_ids"], [float(x) for x in row[f"{model}_support_logprobs"]]
            assert len(set(ids)) == len(logprobs) == 5
            assert logprobs == sorted(logprobs, reverse=True)
            assert sum(map(math.exp, logprobs)) < 1.01
            if row["token_id"] in ids:
                assert row[f"{model}_logprobs"] == pytest.approx(logprobs[ids.index(row["token_id"])], abs=5e-3)
        shared = [i for i, token in enumerate(row["teacher_support_ids"]) if token in row["student_support_ids"]]
        bound = sum(math.exp(float(row["teacher_support_logprobs"][i])) for i in shared)
        assert bound == pytest.approx(row["compatibility_lower_bound"], abs=5e-3)
    if selection["rule"] != "full":
        kept = [row["score"] for row in rows if row["selected"]]
        dropped = [row["score"] for row in rows if not row["selected"]]
        assert min(kept) >= max(dropped)
