"""A preset with weights and a further loss term takes the step of its formula in float64, on every layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers.distributed import run_workers
from tests.helpers.first_step import ROLLOUTS, Observed, Row, observe, reference_gradients
from tests.helpers.training import Layout, make_config, make_models

LAYOUTS = [Layout(1), Layout(2), Layout(4), Layout(2, student=(2, 1)), Layout(4, student=(2, 2), teacher=(4, 1))]


def entropy(log_q: Tensor) -> Tensor:
    return -(log_q.exp() * log_q).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def gate(models: Path) -> float:
    """A teacher entropy that about half of the tokens exceed, and none equals."""
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float64)
    found = []
    for rollout in ROLLOUTS:
        with torch.no_grad():
            log_q = teacher(torch.tensor([rollout.prompt_ids + rollout.response_ids])).logits[0].log_softmax(-1)
        found += entropy(log_q)[len(rollout.prompt_ids) - 1 : -1].tolist()
    ordered = sorted(found)
    return sum(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1]) / 2


def rows_of(ranks: list[Observed]) -> list[Row]:
    return sorted(row for observed in ranks for row in observed.selected)


def check(ranks: list[Observed], expected: tuple[float, dict[str, Tensor]]) -> None:
    loss, gradients = expected
    assert sum(observed.loss for observed in ranks) == pytest.approx(loss, rel=1e-5)
    assert ranks[0].metrics["train/loss"] == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ranks[0].gradients[name].double(), gradient, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "layout,passes",
    [(layout, "two") for layout in LAYOUTS] + [(layout, "one") for layout in LAYOUTS if layout.student[1] == 1],
    ids=str,
)
def test_a_gated_term_is_added_to_the_loss(models: Path, gate: float, layout: Layout, passes: str, tmp_path: Path):
    parameters = {"entropy": gate, "coefficient": 0.5}
    config = make_config(models, layout, selection={"rule": "eopd", "parameters": parameters, "passes": passes})
    ranks = run_workers(observe, layout.world_size, tmp_path, config, ROLLOUTS)
    assert {observed.metrics["train/one_pass"] for observed in ranks} == {float(passes == "one")}
    rows = rows_of(ranks)
    assert len(rows) == sum(len(rollout.response_ids) for rollout in ROLLOUTS)

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl(log_p, log_q) + 0.5 * (entropy(log_q) > gate) * kl(log_q, log_p)

    expected = reference_gradients(models, ROLLOUTS, rows, divergence=divergence)
    plain, _ = reference_gradients(models, ROLLOUTS, rows)
    assert expected[0] > 1.1 * plain, "the gate is open somewhere"
    check(ranks, expected)


@pytest.mark.parametrize("layout", [Layout(1), Layout(3), Layout(2, student=(2, 1))], ids=str)
def test_whole_rollouts_and_their_weights_are_the_same_in_one_pass(models: Path, layout: Layout, tmp_path: Path):
    one, two = (
        run_workers(
            observe,
            layout.world_size,
            tmp_path / passes,
            make_config(models, layout, selection={"rule": "fire", "retention_ratio": 0.5, "passes": passes}),
            ROLLOUTS,
        )
        for passes in ("one", "two")
    )
    assert one[0].metrics["train/one_pass"] == 1.0
    rows = rows_of(two)
    assert rows_of(one) == rows
    kept = {rollout for rollout, _, _ in rows}
    assert len(kept) == 3  # ceil(0.5 x 5)
    assert len(rows) == sum(len(ROLLOUTS[rollout].response_ids) for rollout in kept)
    assert len({weight for _, _, weight in rows}) > 3
    expected = reference_gradients(models, ROLLOUTS, rows)
    check(one, expected)
    check(two, expected)
