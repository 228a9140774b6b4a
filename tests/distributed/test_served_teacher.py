"""A step with a teacher behind servers: the same on every layout, its gradients those of a float64 single process."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_tip.config import Config
from megatron_tip.conversion.bridge import export_hf
from megatron_tip.errors import EngineError
from megatron_tip.records import Rollout
from megatron_tip.teachers.server_scorer import generated_positions
from megatron_tip.training.step import score, select_then_train, train_step
from tests.helpers import reference
from tests.helpers.distributed import run_workers
from tests.helpers.fake_teacher import FakeTeacher, scored_by
from tests.helpers.tiny import make_llama
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, make_rollouts

K = 4
# Of two teachers, one rollout of several turns, one empty.
ROLLOUTS = [
    replace(rollout, teacher=("maths", "code")[place % 2], environment_spans=((2, 6), (9, 11)) if place == 0 else ())
    for place, rollout in enumerate(make_rollouts([12, 0, 7, 5, 1]))
]


@dataclass(frozen=True)
class Observed:
    metrics: dict[str, float]
    selected: list[tuple[int, int, float]]
    statistics: dict[tuple[int, int], dict[str, float]]
    loss: float
    gradients: dict[str, torch.Tensor]


def observe(config: Config, rollouts: list[Rollout]) -> Observed:
    metrics = train_step(build_tiny_run(config, rollouts), 1)
    run = build_tiny_run(config, rollouts)
    groups, batch = run.student.groups, run.batch_of(rollouts)
    trained = select_then_train(run, score(run, batch, run.teacher.ask(batch), 1), 1)
    loss, statistics = trained.loss, trained.scored.statistics
    selected, described = [], {}
    if trained.selection is not None and groups.tp_rank == 0:
        index = batch.token_index(groups.dp_cp_rank)
        keys = list(zip(index.rollout_index.tolist(), index.position.tolist(), strict=True))
        weights = trained.selection.row_weights.tolist()
        selected = [(*key, weight) for key, weight in zip(keys, weights, strict=True) if weight]
        assert statistics is not None
        names = ("compatibility", "support_divergence", "topk_reverse_kl", "student_entropy", "teacher_logprobs")
        columns = {name: getattr(statistics, name) for name in names}
        described = {
            key: {name: column[row].item() for name, column in columns.items() if column is not None}
            for row, key in enumerate(keys)
        }
    elif groups.tp_rank:
        loss = 0.0
    for parameter in run.student.model.parameters():  # the exporter knows how to gather and name: let it take gradients
        parameter.data = parameter.main_grad.clone()  # type: ignore[attr-defined]
    exported = export_hf(run.student.model, run.architecture, groups) if groups.dp_cp_rank == 0 else ()
    return Observed(metrics, selected, described, loss, {name: grad.clone() for name, grad in exported})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("models"))
    make_llama(folder / "other", seed=5, num_layers=2)
    return folder


@pytest.fixture(scope="module")
def urls(models: Path) -> Iterator[tuple[str, ...]]:
    with FakeTeacher(models / "teacher") as maths, FakeTeacher(models / "other") as code:
        yield f"maths={maths.url}", f"code={code.url}"


def config_of(models: Path, layout: Layout, urls: tuple[str, ...], **sections: dict[str, Any]) -> Config:
    prompts = models / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 1", "domain": "maths"}\n{"prompt": "print", "domain": "code"}\n')
    values: dict[str, dict[str, Any]] = {
        "teacher": {"kind": "sglang", "urls": urls, "window_tokens": 3},
        "prompts": {"source": "file", "path": prompts, "tasks": (), "teacher_field": "domain"},
        "selection": {"support_size": K, "retention_ratio": 0.5},
        "loss": {"divergence": "topk_reverse_kl"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return make_config(models, layout, **values)


def expected(
    models: Path, selected: list[tuple[int, int, float]], divergence: str
) -> tuple[float, dict[str, torch.Tensor], dict[tuple[int, int], dict[str, float]]]:
    """Loss, gradients and statistics: transformers, float64, one process, plain autograd."""
    student = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float64)
    weights = {(place, position): weight for place, position, weight in selected}
    loss, statistics = torch.zeros((), dtype=torch.float64), {}
    for place, rollout in enumerate(ROLLOUTS):
        ids = rollout.prompt_ids + rollout.response_ids
        log_q = scored_by(models / ("teacher" if rollout.teacher == "maths" else "other"), ids)
        log_p = student(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in generated_positions(rollout):
            row = len(rollout.prompt_ids) + position - 1
            p, q, label = log_p[row], log_q[row], ids[row + 1]
            theirs, ours = reference.top_ids(q[None], K)[0], reference.top_ids(p[None].detach(), K)[0]
            known = torch.tensor(sorted({*theirs.tolist(), *ours.tolist()}))
            others = torch.tensor(sorted(set(range(len(p))) - set(known.tolist())))
            tail_p, tail_q = p[others].logsumexp(0), q[others].logsumexp(0)
            topk = (p[known].exp() * (p[known] - q[known])).sum() + tail_p.exp() * (tail_p - tail_q)
            gap = (p[label] - q[label]).detach()
            value = topk if divergence == "topk_reverse_kl" else gap + gap * (p[label] - p[label].detach())
            loss = loss + weights.get((place, position), 0.0) * value
            statistics[place, position] = {
                "compatibility": q[ours].exp().sum().item(),
                "support_divergence": reference.kl(q[known], p[known]).item(),
                "topk_reverse_kl": topk.item(),
                "student_entropy": reference.entropy(p).item(),
                "teacher_logprobs": q[label].item(),
            }
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, statistics


@pytest.mark.parametrize(
    "layout, divergence, passes",
    [
        (Layout(1), "topk_reverse_kl", "two"),
        (Layout(2, student=(2, 1), sequence_parallel=True), "topk_reverse_kl", "two"),
        (Layout(4, student=(1, 2)), "sampled_token", "two"),  # dp 2
        (Layout(4, student=(4, 1)), "topk_reverse_kl", "two"),
        (Layout(2), "topk_reverse_kl", "one"),
        (Layout(4, student=(2, 1), cp=(2, 1)), "topk_reverse_kl", "two"),
    ],
    ids=str,
)
def test_a_step_is_that_of_float64(
    models: Path, urls: tuple[str, ...], tmp_path: Path, layout: Layout, divergence: str, passes: str
):
    config = config_of(models, layout, urls, loss={"divergence": divergence}, selection={"passes": passes})
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config, ROLLOUTS)
    selected = sorted(row for observed in ranks for row in observed.selected)
    assert len(selected) == 10  # ceil(0.5 x (12 - 6 + 7 + 5 + 1))
    loss, gradients, statistics = expected(models, selected, divergence)
    described = {key: values for observed in ranks for key, values in observed.statistics.items()}
    assert described.keys() == statistics.keys()
    for key, values in statistics.items():
        assert described[key] == pytest.approx(values, rel=1e-3, abs=1e-4), key
    scores = {key: values["compatibility"] for key, values in statistics.items()}
    assert len(set(scores.values())) == len(scores), "rows differ, or their order would not be seen"
    assert sum(observed.loss for observed in ranks) == pytest.approx(loss, rel=1e-4)
    assert ranks[0].gradients.keys() == gradients.keys()
    for name, gradient in ranks[0].gradients.items():
        tolerance = 1e-4 * float(gradients[name].abs().max())
        torch.testing.assert_close(gradient.double(), gradients[name], rtol=0, atol=tolerance, msg=name)
    for observed in ranks:
        assert observed.metrics["train/loss"] == pytest.approx(loss, rel=1e-4)
        mean = sum(values["topk_reverse_kl"] for values in statistics.values()) / len(statistics)
        assert observed.metrics["train/topk_reverse_kl"] == pytest.approx(mean, rel=1e-3)
        assert "train/reverse_kl" not in observed.metrics
        assert observed.metrics["train/one_pass"] == (passes == "one")


def test_without_asking_about_the_students_support_a_lower_bound_selects(models: Path, urls: tuple[str, ...], tmp_path):
    config = config_of(
        models,
        Layout(2, student=(2, 1)),
        urls,
        teacher={"student_support": "skip", "kind": "sglang", "urls": urls},
        selection={"rule": "ta_opd_teachability_lower_bound", "support_size": K, "retention_ratio": 0.5},
    )
    for metrics in run_workers(metrics_of, 2, tmp_path, config, ROLLOUTS):
        assert metrics["selection/num_selected"] == 10.0
        assert "train/compatibility" not in metrics


def metrics_of(config: Config, rollouts: list[Rollout]) -> dict[str, float]:
    return train_step(build_tiny_run(config, rollouts), 1)


def failure_of(config: Config, rollouts: list[Rollout]) -> str:
    run = build_tiny_run(config, rollouts)
    if run.teacher.scorer is not None:  # type: ignore[union-attr]
        for clients in run.teacher.scorer._routes.values():  # type: ignore[union-attr]
            clients[0].close()
    with pytest.raises(EngineError) as caught:
        train_step(run, 1)
    assert type(caught.value) is EngineError, "what has all ranks save the run together"
    assert caught.value.met_on_rank == (None if dist.get_rank() == 0 else 0)
    return str(caught.value)


def test_servers_that_are_gone_end_every_rank_with_a_message(models: Path, urls: tuple[str, ...], tmp_path: Path):
    config = config_of(models, Layout(2, student=(2, 1)), urls, teacher={"wait_seconds": 0.0})
    asked, told = run_workers(failure_of, 2, tmp_path, config, ROLLOUTS)
    assert asked == told
    assert asked.startswith("teacher 'maths': none of its 1 servers scored a rollout")


def test_a_replica_without_rollouts_takes_part(models: Path, urls: tuple[str, ...], tmp_path: Path):
    """It knows of the student's top-K in no row, and still sends and receives what the others do."""
    config, rollouts = config_of(models, Layout(2), urls), ROLLOUTS[2:3]
    (tmp_path / "1").mkdir()
    (single,) = run_workers(metrics_of, 1, tmp_path / "1", config_of(models, Layout(1), urls), rollouts)
    for metrics in run_workers(metrics_of, 2, tmp_path, config, rollouts):
        assert metrics["train/loss"] == pytest.approx(single["train/loss"], rel=1e-5)
        assert metrics["train/grad_norm"] == pytest.approx(single["train/grad_norm"], rel=1e-5)


def metrics_of_a_broken_student(config: Config, rollouts: list[Rollout]) -> dict[str, float]:
    run = build_tiny_run(config, rollouts)
    if run.student.groups.is_last_stage:
        run.student.output_head.data.fill_(float("nan"))
    return train_step(run, 1)


def test_a_student_that_is_not_finite_skips_the_step_on_every_rank(models: Path, urls: tuple[str, ...], tmp_path: Path):
    config = config_of(models, Layout(2, student=(1, 2)), urls, run={"folder": tmp_path / "run"})
    for metrics in run_workers(metrics_of_a_broken_student, 2, tmp_path, config, ROLLOUTS):
        assert metrics["train/skipped_not_finite"] == 1.0
