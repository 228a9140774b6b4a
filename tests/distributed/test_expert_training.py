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
)
from tests.helpers.tiny import make_experts, make_qwen
from tests.helpers.training import Layout, build_tiny_run, engine_of, make_config, make_rollouts

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
    (Layout(2, cp=(2, 2)), {}, {"expert_model_parallel_size": 2}),
    # replicas of two parts each share experts, and have different numbers of micro-batches
    (Layout(4, cp=(2, 2)), {"expert_model_parallel_size": 4}, {"expert_model_parallel_size": 4}),
    (
        Layout(4, student=(2, 1), teacher=(1, 2), cp=(2, 1), sequence_parallel=True),
        {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
        {"expert_model_parallel_size": 2},
    ),
    (Layout(4, student=(1, 2), teacher=(1, 1), cp=(2, 4)), {"expert_model_parallel_size": 2}, {}),
]
"""The layout of the other layers, and the experts' of student and teacher."""
IN_ONE_PASS = [case for case in LAYOUTS if case[0].student[1] == 1]
FLOOR = 1e-3
"""See `check_against_reference`."""
AUXILIARY = 0.5
UNEQUAL = {"max_tokens_per_micro_batch": 30}
"""Gives two replicas one and two micro-batches of `ROLLOUTS`."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student and teacher with experts; the student's second layer has none."""
    folder = tmp_path_factory.mktemp("models")
    make_experts(folder / "student", seed=1, mlp_only_layers=[1])
    make_experts(folder / "teacher", seed=2, hidden_size=96, norm_topk_prob=False, tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    config = make_config(models, Layout(1), training=UNEQUAL)
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
    check_against_reference(single.loss, single.gradients, reference, floor=FLOOR)


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
    config = make_config(models, layout, model=student, teacher=teacher, training=UNEQUAL)
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config, ROLLOUTS, timeout_seconds=300)
    check_equal(ranks, single, reference, but=DIFFERENT_BY_LAYOUT, floor=FLOOR)


@pytest.mark.parametrize(
    "layout,student,teacher,recompute",
    [(*case, False) for case in IN_ONE_PASS] + [(*IN_ONE_PASS[0], True)],
    ids=str,
)
def test_one_pass_selects_and_trains_as_two(
    models: Path,
    single: Observed,
    reference: tuple[float, dict[str, torch.Tensor]],
    layout: Layout,
    student: dict[str, int],
    teacher: dict[str, int],
    recompute: bool,
    tmp_path: Path,
) -> None:
    """Replicas that share experts keep step while they hold their outputs, and while they go backward from them."""
    model = {**student, "recompute_activations": recompute}
    config = make_config(models, layout, model=model, teacher=teacher, training=UNEQUAL, selection={"passes": "one"})
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config, ROLLOUTS, timeout_seconds=300)
    check_equal(ranks, single, reference, but=DIFFERENT_BY_LAYOUT | DIFFERENT_BY_PASSES, floor=FLOOR)
    assert {observed.metrics["train/one_pass"] for observed in ranks} == {1.0}


def test_a_dense_student_learns_the_same_from_experts_in_another_layout(tmp_path: Path) -> None:
    make_qwen(tmp_path / "student", qk_norm=True, seed=1)
    make_experts(tmp_path / "teacher", seed=2)
    experts = {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    config = make_config(tmp_path, Layout(1))
    single: Observed = run_workers(observe, 1, tmp_path / "1", config, ROLLOUTS, timeout_seconds=300)[0]
    layout = Layout(4, student=(1, 2), teacher=(2, 1))
    config = make_config(tmp_path, layout, teacher=experts)
    ranks: list[Observed] = run_workers(observe, 4, tmp_path / "4", config, ROLLOUTS, timeout_seconds=300)
    reference = reference_gradients(tmp_path, ROLLOUTS, single.selected)
    check_equal(ranks, single, reference, but=DIFFERENT_BY_LAYOUT)


@pytest.mark.parametrize(
    "layout,experts",
    [(Layout(1), {}), (Layout(4, student=(2, 1), sequence_parallel=True), {"expert_model_parallel_size": 2})],
    ids=str,
)
def test_shared_experts_learn_as_in_float64(layout: Layout, experts: dict[str, int], tmp_path: Path) -> None:
    make_experts(tmp_path / "student", seed=1, mlp_only_layers=[1], shared_size=32)
    make_experts(tmp_path / "teacher", seed=2, hidden_size=96, shared_size=16, norm_topk_prob=False)
    config = make_config(tmp_path, layout, model=experts, teacher=experts)
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config, ROLLOUTS, timeout_seconds=300)
    selected = [row for observed in ranks for row in observed.selected]
    loss, gradients = reference_gradients(tmp_path, ROLLOUTS, selected)
    found = sum(observed.loss for observed in ranks)
    check_against_reference(found, ranks[0].gradients, (loss, by_saved_name(gradients)), floor=FLOOR)


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


def auxiliary_gradients(
    folder: Path, micro_batches: list[list[tuple[int, ...]]], coefficient: float
) -> dict[str, torch.Tensor]:
    """Gradients of Switch Transformer's loss (arXiv:2101.03961, Eq. 4, over the active experts), of each micro-batch of
    sequences by itself and weighted by its tokens; transformers, float64, one process.
    """
    student = AutoModelForCausalLM.from_pretrained(
        folder / "student", dtype=torch.float64, experts_implementation="eager"
    )
    step_tokens = sum(len(ids) for micro_batch in micro_batches for ids in micro_batch)
    loss = torch.zeros((), dtype=torch.float64)
    for micro_batch in micro_batches:
        routed = [student(torch.tensor([ids]), output_router_logits=True).router_logits for ids in micro_batch]
        for layer in zip(*routed, strict=True):
            probabilities = torch.cat(layer).softmax(-1)
            num_tokens, num_experts = probabilities.shape
            active = student.config.num_experts_per_tok
            counts = torch.bincount(probabilities.topk(active).indices.flatten(), minlength=num_experts)
            balance = num_experts * (counts / (active * num_tokens) * probabilities.mean(0)).sum()
            loss = loss + coefficient * balance * num_tokens / step_tokens
    loss.backward()
    return by_saved_name({name: p.grad for name, p in student.named_parameters() if p.grad is not None})


def check_with_auxiliary_loss(
    models: Path, rollouts: list[Rollout], ranks: list[Observed], micro_batches: list[list[tuple[int, ...]]]
) -> None:
    """The gradients are those of the selected rows' loss and of `AUXILIARY` times the auxiliary loss."""
    selected = [row for observed in ranks for row in observed.selected]
    loss, plain = reference_gradients(models, rollouts, selected)
    expected, added = by_saved_name(plain), auxiliary_gradients(models, micro_batches, AUXILIARY)
    router = "model.layers.3.mlp.gate.weight"
    assert added[router].abs().max() > 0.01 * expected[router].abs().max(), "enough to notice"
    for name, gradient in added.items():
        expected[name] = expected[name] + gradient
    found = sum(observed.loss for observed in ranks)
    check_against_reference(found, ranks[0].gradients, (loss, expected), floor=FLOOR)


def trained_ids(rollout: Rollout, last: int) -> tuple[int, ...]:
    """The tokens that go through the model if `last` is the response's last position with a loss."""
    return (*rollout.prompt_ids, *rollout.response_ids)[: len(rollout.prompt_ids) + last]


@pytest.mark.parametrize(
    "layout,experts,lengths,max_tokens,places",
    [
        (Layout(1), {}, [12, 7, 15, 2], 300, [[0, 1, 2, 3]]),
        # 51 tokens and one of padding, over the ranks of both stages
        (Layout(4, student=(2, 2), sequence_parallel=True), {}, [12, 7, 15, 2], 300, [[0, 1, 2, 3]]),
        # one replica has two micro-batches, the other one and then padding
        (Layout(2), {"expert_model_parallel_size": 2}, [9, 9, 9], 16, [[0], [1], [2]]),
        # one replica has padding alone
        (Layout(2), {"expert_model_parallel_size": 2}, [9], 16, [[0]]),
        # parts of sequences with padding at their ends
        (Layout(2, cp=(2, 1)), {}, [12, 7, 15, 2], 300, [[0, 1, 2, 3]]),
        # replicas of two parts each, and padding for one of them
        (Layout(4, cp=(2, 1)), {"expert_model_parallel_size": 4}, [9, 9, 9], 16, [[0], [1], [2]]),
    ],
    ids=["one", "tp2-pp2", "ep2", "ep2-empty", "cp2", "cp2-ep4"],
)
def test_the_auxiliary_loss_adds_its_gradient_whatever_the_layout_and_padding(
    models: Path,
    layout: Layout,
    experts: dict[str, int],
    lengths: list[int],
    max_tokens: int,
    places: list[list[int]],
    tmp_path: Path,
) -> None:
    rollouts = make_rollouts(lengths)
    sections: dict[str, Any] = {
        "model": {"moe_aux_loss_coeff": AUXILIARY, **experts},
        "selection": {"rule": "full", "retention_ratio": 1.0},
        "training": {"max_tokens_per_micro_batch": max_tokens},
    }
    config = make_config(models, layout, **sections)
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config, rollouts, timeout_seconds=300)
    sequences = [trained_ids(rollout, len(rollout.response_ids) - 1) for rollout in rollouts]
    check_with_auxiliary_loss(models, rollouts, ranks, [[sequences[place] for place in part] for part in places])


@pytest.mark.parametrize("passes", ["one", "two"])
def test_the_auxiliary_loss_covers_all_tokens_in_one_pass_and_those_of_the_cut_batch_in_two(
    models: Path, passes: str, tmp_path: Path
) -> None:
    rollouts = make_rollouts([12, 7, 15, 2])
    sections: dict[str, Any] = {
        "model": {"moe_aux_loss_coeff": AUXILIARY},
        "selection": {"passes": passes, "retention_ratio": 0.2},
        "training": {"max_tokens_per_micro_batch": 300},
    }
    config = make_config(models, Layout(1), **sections)
    ranks: list[Observed] = run_workers(observe, 1, tmp_path, config, rollouts, timeout_seconds=300)
    last = [len(rollout.response_ids) - 1 for rollout in rollouts]
    if passes == "two":
        last = [
            max((position for index, position, _ in ranks[0].selected if index == place), default=-1)
            for place in range(len(rollouts))
        ]
        assert sum(last) < sum(len(rollout.response_ids) - 1 for rollout in rollouts), "nothing was cut"
    micro_batch = [trained_ids(rollout, end) for rollout, end in zip(rollouts, last, strict=True) if end >= 0]
    check_with_auxiliary_loss(models, rollouts, ranks, [micro_batch])
