"""A preset with weights and a further loss term takes the step of its formula in float64, on every layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_tip.training.step import train_step
from tests.distributed.test_train_step import reference_gradients, selected_and_gradients
from tests.helpers.distributed import run_workers
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, make_rollouts

ROLLOUTS = make_rollouts([12, 0, 7, 15, 9, 1])
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


def losses_and_metrics(config, rollouts):
    return selected_and_gradients(config, rollouts), train_step(build_tiny_run(config, rollouts), 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_gated_term_is_added_to_the_loss(models: Path, gate: float, layout: Layout, tmp_path: Path):
    selection = {"rule": "eopd", "retention_ratio": 1.0, "parameters": {"entropy": gate, "coefficient": 0.5}}
    config = make_config(models, layout, selection=selection)
    ranks = run_workers(losses_and_metrics, layout.world_size, tmp_path, config, ROLLOUTS)
    num_rows = sum(len(rollout.response_ids) for rollout in ROLLOUTS)
    rows = sorted(row for (selected, _, _), _ in ranks for row in selected)
    assert len(rows) == num_rows

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl(log_p, log_q) + 0.5 * (entropy(log_q) > gate) * kl(log_q, log_p)

    loss, gradients = reference_gradients(models, ROLLOUTS, rows, divergence=divergence)
    plain, _ = reference_gradients(models, ROLLOUTS, rows)
    assert loss > 1.1 * plain, "the gate is open somewhere"
    assert sum(part for (_, part, _), _ in ranks) == pytest.approx(loss, rel=1e-5)
    assert ranks[0][1]["train/loss"] == pytest.approx(loss, rel=1e-5)
    exported = ranks[0][0][2]
    for name, expected in gradients.items():
        torch.testing.assert_close(exported[name].double(), expected, rtol=2e-4, atol=2e-6)
