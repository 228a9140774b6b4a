"""One training step is the same on every layout, and its gradients are those of a float64 single process."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_tip.config import Config
from megatron_tip.records import Rollout
from megatron_tip.training.step import train_step
from tests.helpers.distributed import run_workers
from tests.helpers.first_step import (
    DIFFERENT_BY_LAYOUT,
    DIFFERENT_BY_PASSES,
    ROLLOUTS,
    Observed,
    check_against_reference,
    check_equal,
    observe,
    reference_gradients,
    reverse_kl,
)
from tests.helpers.tiny import make_qwen
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, make_rollouts

LAYOUTS = [
    Layout(3, student=(3, 1)),
    Layout(2, student=(1, 2)),
    Layout(2, student=(1, 1)),  # dp 2
    Layout(3, student=(3, 1), teacher=(1, 3)),
    Layout(2, student=(2, 1), sequence_parallel=True),
    Layout(4, student=(4, 1)),
    Layout(4, student=(2, 2), teacher=(4, 1)),
    Layout(6, student=(1, 2), teacher=(3, 1)),  # student dp 3, teacher dp 2
    Layout(2, cp=(2, 2)),
    Layout(2, cp=(2, 1)),  # teacher dp 2
    Layout(2, cp=(1, 2)),  # student dp 2
    Layout(4, cp=(2, 4)),  # student dp 2
    Layout(4, student=(2, 1), cp=(2, 2), sequence_parallel=True),
    Layout(4, student=(1, 2), teacher=(2, 1), cp=(2, 1)),  # teacher dp 2
]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), tied=request.param)


@pytest.fixture(scope="module")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    return run_workers(observe, 1, tmp_path_factory.mktemp("single"), make_config(models, Layout(1)), ROLLOUTS)[0]


@pytest.fixture(scope="module")
def reference(models: Path, single: Observed) -> tuple[float, dict[str, torch.Tensor]]:
    return reference_gradients(models, ROLLOUTS, single.selected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_first_step_is_that_of_a_single_process(
    models: Path, single: Observed, reference: tuple[float, dict[str, torch.Tensor]], layout: Layout, tmp_path: Path
):
    config = make_config(models, layout)
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config, ROLLOUTS)
    check_equal(ranks, single, reference, but=DIFFERENT_BY_LAYOUT)


IN_ONE_PASS = [Layout(1), *(layout for layout in LAYOUTS if layout.student[1] == 1)]


@pytest.mark.parametrize(
    "layout,recompute",
    [(layout, False) for layout in IN_ONE_PASS] + [(layout, True) for layout in IN_ONE_PASS if layout.world_size < 3],
    ids=str,
)
def test_one_pass_selects_and_trains_as_two(
    models: Path,
    single: Observed,
    reference: tuple[float, dict[str, torch.Tensor]],
    layout: Layout,
    recompute: bool,
    tmp_path: Path,
):
    sections = {"selection": {"passes": "one"}, "model": {"recompute_activations": recompute}}
    config = make_config(models, layout, **sections)
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config, ROLLOUTS)
    check_equal(ranks, single, reference, but=DIFFERENT_BY_LAYOUT | DIFFERENT_BY_PASSES)
    for observed in ranks:
        assert observed.metrics["train/one_pass"] == 1.0
        assert observed.metrics["train/saved_token_share"] == 0.0


def test_a_single_process_agrees_with_float64(single: Observed, reference: tuple[float, dict[str, torch.Tensor]]):
    assert len(single.selected) == 14  # ceil(0.3 x 44)
    check_against_reference(single.loss, single.gradients, reference)


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3", "qwen2"])
@pytest.mark.parametrize(
    "layout", [Layout(2, student=(2, 1), sequence_parallel=True), Layout(4, student=(2, 2))], ids=str
)
def test_grouped_queries_with_biases_or_qk_norm_agree_with_float64(qk_norm: bool, layout: Layout, tmp_path: Path):
    make_qwen(tmp_path / "student", qk_norm=qk_norm, seed=1)
    make_qwen(tmp_path / "teacher", qk_norm=qk_norm, seed=2)
    ranks: list[Observed] = run_workers(
        observe, layout.world_size, tmp_path / "workers", make_config(tmp_path, layout), ROLLOUTS
    )
    reference = reference_gradients(tmp_path, ROLLOUTS, [row for observed in ranks for row in observed.selected])
    check_against_reference(sum(observed.loss for observed in ranks), ranks[0].gradients, reference)


def jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float = 0.3) -> torch.Tensor:
    """The generalised Jensen-Shannon divergence, beta on the teacher's side."""
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * reverse_kl(log_q, log_m) + (1 - beta) * reverse_kl(log_p, log_m)


def test_the_settings_of_the_loss_reach_it(models: Path, tmp_path: Path):
    loss = {"divergence": "jsd", "jsd_beta": 0.3, "temperature": 2.0, "chunk_rows": 3}
    config = make_config(models, Layout(4, student=(2, 2)), loss=loss)
    ranks: list[Observed] = run_workers(observe, 4, tmp_path, config, ROLLOUTS)
    selected = [row for observed in ranks for row in observed.selected]
    reference = reference_gradients(models, ROLLOUTS, selected, divergence=jsd, temperature=2.0)
    check_against_reference(sum(observed.loss for observed in ranks), ranks[0].gradients, reference)


def kernels_compiled(config: Config, rollouts: list[Rollout]) -> set[str]:
    """Names of what a step hands to torch.compile, which leaves it as it is here."""
    seen: set[str] = set()

    def noted(kernel: Any, **_: Any) -> Any:
        seen.add(kernel.__name__)
        return kernel

    with patch("torch.compile", noted):
        train_step(build_tiny_run(config, rollouts), 1)
    return seen


@pytest.mark.parametrize(
    "name, expected", [("compiled", {"statistics_sums", "reverse_kl_sums", "reverse_kl_gradient"}), ("auto", set())]
)
def test_loss_kernels_reach_statistics_and_loss(models: Path, tmp_path: Path, name: str, expected: set[str]):
    config = make_config(models, Layout(1), loss={"kernels": name})
    (seen,) = run_workers(kernels_compiled, 1, tmp_path, config, ROLLOUTS)
    assert seen == expected


def test_a_batch_without_a_valid_token_is_skipped_and_counted(models: Path, tmp_path: Path):
    layout = Layout(2, student=(2, 1))
    results = run_workers(observe_metrics, 2, tmp_path, make_config(models, layout), make_rollouts([0, 0]))
    for metrics in results:
        assert metrics["train/skipped_no_valid_token"] == 1.0
        assert metrics["rollout/num_empty"] == 2.0
        assert "train/loss" not in metrics


def observe_metrics(config: Config, rollouts: list[Rollout]) -> dict[str, float]:
    return train_step(build_tiny_run(config, rollouts), 1)


@pytest.mark.parametrize("layout,passes", [(Layout(6, student=(1, 2)), "two"), (Layout(3), "one")], ids=str)
def test_a_replica_without_rollouts_takes_part(models: Path, tmp_path: Path, layout: Layout, passes: str):
    """Three replicas for one rollout."""
    rollouts = make_rollouts([9])
    single = run_workers(observe_metrics, 1, tmp_path / "1", make_config(models, Layout(1)), rollouts)[0]
    config = make_config(models, layout, selection={"passes": passes})
    for metrics in run_workers(observe_metrics, layout.world_size, tmp_path / "all", config, rollouts):
        assert metrics["train/loss"] == pytest.approx(single["train/loss"], rel=1e-5)
        assert metrics["train/grad_norm"] == pytest.approx(single["train/grad_norm"], rel=1e-5)


def skipped_then_taken(config: Config, rollouts: list[Rollout]) -> tuple[dict[str, float], dict[str, float]]:
    run = build_tiny_run(config, rollouts)
    head, whole = run.student.output_head.data, run.student.output_head.data.clone()
    head.fill_(float("nan"))
    skipped = train_step(run, 1)
    head.copy_(whole)
    return skipped, train_step(run, 1)


def test_one_pass_skips_a_step_that_is_not_finite_and_takes_the_next(models: Path, single: Observed, tmp_path: Path):
    config = make_config(models, Layout(2), selection={"passes": "one"}, run={"folder": tmp_path / "run"})
    for skipped, taken in run_workers(skipped_then_taken, 2, tmp_path, config, ROLLOUTS):
        assert skipped["train/skipped_not_finite"] == 1.0
        for name in ("train/loss", "train/grad_norm"):
            assert taken[name] == pytest.approx(single.metrics[name], rel=1e-5), name


def test_teacher_equal_to_student_gives_nothing_to_learn(tmp_path: Path):
    models = make_models(tmp_path / "models")
    config = make_config(models, Layout(2, student=(2, 1)), teacher={"path": models / "student"})
    for metrics in run_workers(observe_metrics, 2, tmp_path, config, ROLLOUTS):
        assert metrics["train/loss"] == pytest.approx(0.0, abs=1e-6)
        assert metrics["train/grad_norm"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("passes", ["one", "two"])
def test_parts_of_a_sequence_share_its_budget(models: Path, passes: str, tmp_path: Path):
    """Budgets of whole rollouts see the rows of all parts."""
    sections = {"selection": {"scope": "rollout", "passes": passes}}
    single, *parts = (
        run_workers(observe, layout.world_size, tmp_path / str(layout.cp), config, ROLLOUTS)
        for layout in (Layout(1), Layout(2, cp=(2, 2)), Layout(4, student=(2, 1), cp=(2, 1)))
        for config in [make_config(models, layout, **sections)]
    )
    for ranks in parts:
        assert sorted(row for observed in ranks for row in observed.selected) == sorted(single[0].selected)
        for name in ("train/loss", "train/grad_norm", "selection/num_selected"):
            assert ranks[0].metrics[name] == pytest.approx(single[0].metrics[name], rel=1e-5), name


def skipped_for_one_part(config: Config, rollouts: list[Rollout]) -> float:
    """Breaks the teacher's head on one rank alone, whose parts of the sequences are then not finite."""
    run = build_tiny_run(config, rollouts)
    if run.student.groups.cp_rank == 1:
        run.teacher.output_head.fill_(float("nan"))  # type: ignore[attr-defined]
    return train_step(run, 1).get("train/skipped_not_finite", 0.0)


@pytest.mark.parametrize("passes", ["one", "two"])
def test_a_part_that_is_not_finite_skips_the_step_on_all_ranks(models: Path, passes: str, tmp_path: Path):
    config = make_config(
        models, Layout(2, cp=(2, 2)), selection={"passes": passes}, tracking={"view_every_steps": 1, "view_samples": 1}
    )
    assert run_workers(skipped_for_one_part, 2, tmp_path, config, ROLLOUTS) == [1.0, 1.0]


def test_a_full_budget_is_plain_distillation(models: Path, tmp_path: Path):
    """A budget of all tokens (ceil(0.99 x 44)), scored, selected and cut, equals the rule "full"."""
    layout = Layout(2, student=(2, 1))
    by_rule, full = (
        run_workers(observe_metrics, 2, tmp_path / rule, make_config(models, layout, selection=selection), ROLLOUTS)[0]
        for rule, selection in (
            ("teachability", {"rule": "ta_opd_teachability", "retention_ratio": 0.99}),
            ("full", {"rule": "full", "retention_ratio": 1.0}),
        )
    )
    assert full["selection/num_selected"] == 44.0
    for name in ("train/loss", "train/grad_norm"):
        assert by_rule[name] == pytest.approx(full[name], rel=1e-5), name
    assert by_rule["train/reverse_kl"] == pytest.approx(full["train/loss"], rel=1e-5)


def counted_step(config: Config, rollouts: list[Rollout]) -> dict[str, float]:
    """A step's metrics, with the number of micro-batches that the student read, and how many with a graph."""
    run, calls = build_tiny_run(config, rollouts), []
    run.student.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    metrics = train_step(run, 1)
    return metrics | {"calls": float(len(calls)), "with_graph": float(sum(calls))}


@pytest.mark.parametrize("recompute", [False, True])
def test_one_pass_runs_the_student_once(models: Path, tmp_path: Path, recompute: bool):
    """Each micro-batch of the uncut batch once, with its graph; two passes without, and then those of the cut batch."""
    found = {}
    for passes in ("one", "two"):
        sections = {"selection": {"passes": passes}, "model": {"recompute_activations": recompute}}
        config = make_config(models, Layout(1), **sections)
        (found[passes],) = run_workers(counted_step, 1, tmp_path / passes, config, ROLLOUTS)
    uncut = found["one"]["train/num_micro_batches_uncut"]
    assert uncut > 1
    assert found["one"]["calls"] == found["one"]["with_graph"] == uncut
    assert found["two"]["with_graph"] == found["two"]["train/num_micro_batches"]
    assert found["two"]["calls"] == uncut + found["two"]["train/num_micro_batches"]


@pytest.mark.parametrize("layout", [Layout(1), Layout(2, student=(1, 2))], ids=str)
def test_auto_takes_one_pass_where_that_is_possible(models: Path, layout: Layout, tmp_path: Path):
    selection = {"passes": "auto", "retention_ratio": 0.6}  # expected to cut few tokens
    config = make_config(models, layout, selection=selection)
    for metrics in run_workers(observe_metrics, layout.world_size, tmp_path, config, ROLLOUTS):
        assert metrics["train/one_pass"] == float(layout.student[1] == 1)


def test_importance_weights_are_the_same_in_one_pass(models: Path, tmp_path: Path):
    sections = {"rollout": {"importance_cap": 2.0}}
    one, two = (
        run_workers(
            observe,
            2,
            tmp_path / passes,
            make_config(models, Layout(2), selection={"passes": passes}, **sections),
            ROLLOUTS,
        )
        for passes in ("one", "two")
    )
    assert sorted(row for observed in one for row in observed.selected) == sorted(
        row for observed in two for row in observed.selected
    )
    assert len({weight for observed in two for _, _, weight in observed.selected}) > 1
    reference = reference_gradients(models, ROLLOUTS, [row for observed in two for row in observed.selected])
    check_against_reference(sum(observed.loss for observed in one), one[0].gradients, reference)


SPANS = {0: ((2, 6), (9, 11)), 3: ((1, 14),)}


@pytest.mark.parametrize(
    "rule", [{"rule": "full", "retention_ratio": 1.0}, {"retention_ratio": 0.3}], ids=["full", "top"]
)
def test_tokens_of_an_environment_are_read_and_never_reach_the_loss(models: Path, tmp_path: Path, rule: dict[str, Any]):
    """Loss and gradients are those of float64 over the generated tokens; the others' log-probabilities may be anything.

    The environment's tokens stay in the context: the reference runs over the whole sequences.
    """
    episodes = [replace(rollout, environment_spans=SPANS.get(place, ())) for place, rollout in enumerate(ROLLOUTS)]
    generated = [
        (place, position)
        for place, rollout in enumerate(episodes)
        for position in range(len(rollout.response_ids))
        if not any(start <= position < end for start, end in rollout.environment_spans)
    ]
    layout = Layout(2, student=(2, 1))
    ranks = run_workers(observe, 2, tmp_path, make_config(models, layout, selection=rule), episodes)
    selected = ranks[0].selected
    assert {(place, position) for place, position, _ in selected} <= set(generated)
    expected = 25 if rule.get("rule") == "full" else 8  # 44 - 6 - 13; ceil(0.3 x 25)
    assert len(selected) == len(set(selected)) == ranks[0].metrics["selection/num_selected"] == expected
    assert ranks[0].metrics["selection/num_valid"] == 25.0
    assert [weight for _, _, weight in selected] == pytest.approx([1 / expected] * expected)
    assert ranks[0].metrics["rollout/response_tokens"] == 25.0
    assert ranks[0].metrics["rollout/environment_tokens"] == 19.0
    check_against_reference(
        sum(observed.loss for observed in ranks), ranks[0].gradients, reference_gradients(models, episodes, selected)
    )
