"""A training step of models with experts is the same in every layout, and its gradients those of a single process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tip.config import Config
from megatron_tip.conversion.experts import split_experts
from megatron_tip.records import Rollout
from megatron_tip.training.probe import probe_logprobs
from megatron_tip.training.step import train_step
from megatron_tip.training.weight_sync import update_engine
from tests.distributed.test_train_step import DIFFERENT_BY_LAYOUT, Observed, observe, reference_gradients
from tests.helpers.distributed import run_workers
from tests.helpers.tiny import make_experts, make_qwen
from tests.helpers.training import Layout, build_tiny_run, engine_of, make_config, make_rollouts

ROLLOUTS = make_rollouts([12, 0, 7, 15, 9, 1])
LAYOUTS: list[tuple[Layout, dict[str, int], dict[str, int]]] = [
    (Layout(2), {"expert_model_parallel_size": 2}, {}),
    (Layout(2, student=(2, 1), sequence_parallel=True), {"expert_tensor_parallel_size": 1}, {}),
    (
        Layout(4, student=(2, 1), teacher=(1, 1), sequence_parallel=True),
        {"expert_model_parallel_size": 2},
        {"expert_model_parallel_size": 4},
    ),
    (
        Layout(4, student=(1, 2), teacher=(2, 1)),
        {"expert_model_parallel_size": 2},
        {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    (
        Layout(4, student=(2, 2), teacher=(2, 2), sequence_parallel=True),
        {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {},
    ),
]
"""The layout of the other layers, and the experts' of student and teacher."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student and teacher with experts; the student's second layer has none."""
    folder = tmp_path_factory.mktemp("models")
    make_experts(folder / "student", seed=1, mlp_only_layers=[1])
    make_experts(folder / "teacher", seed=2, hidden_size=96, norm_topk_prob=False, tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    config = make_config(models, Layout(1))
    return run_workers(observe, 1, tmp_path_factory.mktemp("single"), config, ROLLOUTS, timeout_seconds=300)[0]


@pytest.fixture(scope="module")
def reference(models: Path, single: Observed) -> tuple[float, dict[str, torch.Tensor]]:
    loss, gradients = reference_gradients(models, ROLLOUTS, single.selected)
    return loss, by_saved_name(gradients)


def by_saved_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = [split_experts(name, tensor) or {name: tensor} for name, tensor in tensors.items()]
    return {name: tensor for part in parts for name, tensor in part.items()}


def test_a_single_process_agrees_with_float64(
    single: Observed, reference: tuple[float, dict[str, torch.Tensor]]
) -> None:
    check(single.loss, single.gradients, reference)


@pytest.mark.parametrize("layout,student,teacher", LAYOUTS, ids=str)
def test_the_first_step_is_that_of_a_single_process(
    models: Path,
    single: Observed,
    reference: tuple[float, dict[str, torch.Tensor]],
    layout: Layout,
    student: dict[str, int],
    teacher: dict[str, int],
    tmp_path: Path,
) -> None:
    config = make_config(models, layout, model=student, teacher=teacher)
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config, ROLLOUTS, timeout_seconds=300)
    for observed in ranks:
        for name, value in observed.metrics.items():
            if name not in DIFFERENT_BY_LAYOUT:
                assert value == pytest.approx(single.metrics[name], rel=1e-5, abs=1e-7), name
    assert sorted(row for observed in ranks for row in observed.selected) == sorted(single.selected)
    check(sum(observed.loss for observed in ranks), ranks[0].gradients, reference)


def check(loss: float, gradients: dict[str, torch.Tensor], reference: tuple[float, dict[str, torch.Tensor]]) -> None:
    expected_loss, expected = reference
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        tolerance = 1e-5 * max(float(expected[name].abs().max()), 1e-3)
        torch.testing.assert_close(gradient.double(), expected[name], rtol=0, atol=tolerance, msg=name)


def test_a_dense_student_learns_the_same_from_experts_in_another_layout(tmp_path: Path) -> None:
    make_qwen(tmp_path / "student", qk_norm=True, seed=1)
    make_experts(tmp_path / "teacher", seed=2)
    experts = {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    config = make_config(tmp_path, Layout(1))
    single, *_ = run_workers(observe, 1, tmp_path / "1", config, ROLLOUTS, timeout_seconds=300)
    layout = Layout(4, student=(1, 2), teacher=(2, 1))
    config = make_config(tmp_path, layout, teacher=experts)
    for observed in run_workers(observe, 4, tmp_path / "4", config, ROLLOUTS, timeout_seconds=300):
        for name in ("train/loss", "train/grad_norm", "selection/num_selected"):
            assert observed.metrics[name] == pytest.approx(single.metrics[name], rel=1e-5), name


def steps_and_probe(config: Config, rollouts: list[Rollout]) -> tuple[list[dict[str, float]], Any, Any]:
    """Two steps with clipped gradients, the weights behind them, and the probe's logprobs."""
    run = build_tiny_run(config, rollouts)
    lines = []
    for step in (1, 2):
        update_engine(run, weight_version=step - 1)
        lines.append(train_step(run, step))
    update_engine(run, weight_version=2)
    weights = getattr(engine_of(run), "weights", {})
    return lines, weights, probe_logprobs(run.student, run.architecture.vocab_size, run.device)


def test_replicas_that_share_experts_keep_step_with_less_work_than_ranks(models: Path, tmp_path: Path) -> None:
    """One rollout for four replicas; the distributed optimizer, clipping and the probe with them."""
    rollouts = make_rollouts([9])
    found = []
    for layout, experts in ((Layout(1), {}), (Layout(4), {"expert_model_parallel_size": 2})):
        # The large epsilon keeps rounding from turning into steps of the full learning rate.
        optimizer = {"clip_grad": 0.05, "distributed": layout.world_size > 1, "epsilon": 1e-2}
        config = make_config(models, layout, model=experts, teacher=experts, optimizer=optimizer)
        folder = tmp_path / str(layout.world_size)
        found.append(run_workers(steps_and_probe, layout.world_size, folder, config, rollouts, timeout_seconds=300)[0])
    (lines, weights, probe), (lines_of_four, weights_of_four, probe_of_four) = found
    for line, line_of_four in zip(lines, lines_of_four, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert line_of_four[name] == pytest.approx(line[name], rel=1e-4), name
    assert lines[0]["train/grad_norm"] > 0.05, "nothing was clipped"
    torch.testing.assert_close(weights_of_four, weights, rtol=1e-4, atol=1e-5)
    assert probe_of_four == pytest.approx(probe, abs=1e-3)


def auxiliary_gradients(folder: Path, rollouts: list[Rollout], coefficient: float) -> dict[str, torch.Tensor]:
    """Gradients of Switch Transformer's loss (arXiv:2101.03961, Eq. 4, over the active experts) on one micro-batch of
    all tokens that predict a response; transformers, float64, one process.
    """
    student = AutoModelForCausalLM.from_pretrained(
        folder / "student", dtype=torch.float64, experts_implementation="eager"
    )
    by_sequence = []
    for rollout in rollouts:
        if len(rollout.response_ids):
            ids = torch.tensor([(rollout.prompt_ids + rollout.response_ids)[:-1]])
            by_sequence.append(student(ids, output_router_logits=True).router_logits)
    loss = torch.zeros((), dtype=torch.float64)
    for layer in zip(*by_sequence, strict=True):
        probabilities = torch.cat(layer).softmax(-1)
        num_tokens, num_experts = probabilities.shape
        active = student.config.num_experts_per_tok
        counts = torch.bincount(probabilities.topk(active).indices.flatten(), minlength=num_experts)
        share = counts / (active * num_tokens)
        loss = loss + coefficient * num_experts * (share * probabilities.mean(0)).sum()
    loss.backward()
    return by_saved_name({name: p.grad for name, p in student.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("layout", [Layout(1), Layout(2, student=(2, 1), sequence_parallel=True)], ids=["one", "tp2"])
def test_the_auxiliary_loss_adds_its_gradient_whatever_the_layout(models: Path, layout: Layout, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "selection": {"rule": "full", "retention_ratio": 1.0},
        "training": {"max_tokens_per_micro_batch": 300},
    }
    config = make_config(models, layout, model={"moe_aux_loss_coeff": 0.5}, **sections)
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config, ROLLOUTS, timeout_seconds=300)
    loss, plain = reference_gradients(models, ROLLOUTS, [row for observed in ranks for row in observed.selected])
    expected, added = by_saved_name(plain), auxiliary_gradients(models, ROLLOUTS, 0.5)
    router = "model.layers.3.mlp.gate.weight"
    assert added[router].abs().max() > 0.01 * expected[router].abs().max(), "enough to notice"
    for name, gradient in added.items():
        expected[name] = expected[name] + gradient
    check(sum(observed.loss for observed in ranks), ranks[0].gradients, (loss, expected))
