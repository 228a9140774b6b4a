"""What one rank sees of a run's first step, and the same step by transformers in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tip.config import Config
from megatron_tip.conversion.bridge import export_hf
from megatron_tip.records import Rollout
from megatron_tip.training.step import score, select_then_train, train_step
from tests.helpers.training import build_tiny_run, make_rollouts

ROLLOUTS = make_rollouts([12, 0, 7, 15, 9, 1])
DIFFERENT_BY_LAYOUT = {
    "perf/saved_train_seconds",
    "train/num_micro_batches",
    "train/num_micro_batches_uncut",
    "train/padding_token_share",
}
DIFFERENT_BY_PASSES = {"train/num_model_tokens", "train/saved_token_share", "train/one_pass"}
Row = tuple[int, int, float]
"""Rollout, position in the response, weight."""


@dataclass(frozen=True)
class Observed:
    """What one rank saw of the first step: its metrics; what its replica selected; its part of the loss; on rank 0 the
    gradients under Hugging Face names.
    """

    metrics: dict[str, float]
    selected: list[Row]
    loss: float
    gradients: dict[str, torch.Tensor]


def observe(config: Config, rollouts: list[Rollout]) -> Observed:
    return Observed(train_step(build_tiny_run(config, rollouts), 1), *selected_and_gradients(config, rollouts))


def selected_and_gradients(config: Config, rollouts: list[Rollout]) -> tuple[list[Row], float, dict[str, torch.Tensor]]:
    run = build_tiny_run(config, rollouts)
    groups = run.student.groups
    batch = run.batch_of(rollouts)
    teacher_rows = run.teacher.ask(batch)
    trained = select_then_train(run, score(run, batch, teacher_rows, 1), 1)
    assert not trained.scored.held, "every graph is given up"
    loss, weights = trained.loss, []
    if trained.selection is not None and groups.tp_rank == 0:
        index = batch.token_index(groups.dp_cp_rank)
        columns = (index.rollout_index, index.position, trained.selection.row_weights)
        weights = [row for row in zip(*(column.tolist() for column in columns), strict=True) if row[2]]
    elif groups.tp_rank:
        loss = 0.0
    for parameter in run.student.model.parameters():  # the exporter knows how to gather and name: let it take gradients
        parameter.data = parameter.main_grad.clone()  # type: ignore[attr-defined]
    exported = export_hf(run.student.model, run.architecture, groups) if groups.holds_first_copy else ()
    return weights, loss, {name: grad.clone() for name, grad in exported}


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def reference_gradients(
    folder: Path,
    rollouts: list[Rollout],
    weights: list[Row],
    *,
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = reverse_kl,
    temperature: float = 1.0,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of weight x divergence and its gradients: transformers, float64, one process, plain autograd."""
    student, teacher = (
        # Without "eager", transformers multiplies experts by a kernel that has no float64.
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64, experts_implementation="eager")
        for name in ("student", "teacher")
    )
    loss = torch.zeros((), dtype=torch.float64)
    for place, rollout in enumerate(rollouts):
        own = [(position, weight) for index, position, weight in weights if index == place]
        if not own:
            continue
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            log_q = (teacher(ids).logits[0] / temperature).log_softmax(-1)
        log_p = (student(ids).logits[0] / temperature).log_softmax(-1)
        for position, weight in own:
            row = len(rollout.prompt_ids) + position - 1
            loss = loss + weight * divergence(log_p[row], log_q[row])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def check_equal(
    ranks: list[Observed],
    single: Observed,
    reference: tuple[float, dict[str, torch.Tensor]],
    *,
    but: set[str],
    floor: float = 0.0,
) -> None:
    """The step of `ranks` is that of a `single` process, but for some metrics; see `check_against_reference`."""
    for observed in ranks:
        assert observed.metrics.keys() == single.metrics.keys()
        for name, value in observed.metrics.items():
            if name in but:
                continue
            assert value == pytest.approx(single.metrics[name], rel=1e-5, abs=1e-7), name
    assert sorted(row for observed in ranks for row in observed.selected) == sorted(single.selected)
    check_against_reference(sum(observed.loss for observed in ranks), ranks[0].gradients, reference, floor=floor)


def check_against_reference(
    loss: float,
    gradients: dict[str, torch.Tensor],
    reference: tuple[float, dict[str, torch.Tensor]],
    *,
    floor: float = 0.0,
) -> None:
    """Loss and gradients are the reference's, to 1e-5 of each tensor's largest value, or of `floor` if that is larger.

    The gradients of experts that few tokens pass through are small, and rounding is that of the sums before them.
    """
    expected_loss, expected = reference
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        tolerance = 1e-5 * max(float(expected[name].abs().max()), floor)
        torch.testing.assert_close(gradient.double(), expected[name].double(), rtol=0, atol=tolerance, msg=name)
