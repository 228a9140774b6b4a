"""Which batches take one forward pass: by memory, by what the cut would save, and never over several stages."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.machine import Machine
from megatron_tip.planning.memory_estimate import estimate_memory
from megatron_tip.planning.passes import OnePass, expected_cut_share, plan_passes
from megatron_tip.planning.plan import outline_run
from tests.helpers.tiny import make_experts
from tests.helpers.training import Layout, make_config, make_models, make_rollouts

NEVER, ALWAYS = 0, sys.maxsize


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def batch_of(response_lengths: list[int], *, dp_size: int = 1) -> StepBatch:
    return StepBatch.over(
        make_rollouts(response_lengths),
        dp_size=dp_size,
        max_tokens=64,
        pad_token_id=0,
        token_multiple=1,
        device=torch.device("cpu"),
    )


def planned(config: Config, world_size: int = 1, memory_gib: float = 8.0) -> OnePass:
    outline = outline_run(config, world_size, Machine(is_elsewhere=True))
    return plan_passes(config, outline, memory_gib=memory_gib, on_gpu=False)


def configured(models: Path, layout: Layout = Layout(1), **sections: dict[str, Any]) -> Config:  # noqa: B008 (frozen)
    sections = {"selection": {"passes": "auto"}, **sections}
    return make_config(models, layout, **sections)


@pytest.mark.parametrize(
    "passes,pp_size,more,expected",
    [
        ("two", 1, {}, NEVER),
        ("one", 1, {}, ALWAYS),
        ("auto", 2, {}, NEVER),
        ("one", 1, {"rule": "random"}, NEVER),  # nothing to score
        ("auto", 1, {"rule": "full", "retention_ratio": 1.0}, NEVER),
    ],
)
def test_what_the_setting_says(models: Path, passes: str, pp_size: int, more: dict[str, Any], expected: int):
    config = configured(models, Layout(pp_size, student=(1, pp_size)), selection={"passes": passes, **more})
    assert planned(config, pp_size).max_tokens == expected


@pytest.mark.parametrize("sections", [{"rollout": {"importance_cap": 2.0}}, {"tracking": {"view_every_steps": 3}}])
def test_what_is_scored_for_another_reason_can_be_held_too(models: Path, sections: dict[str, Any]):
    config = configured(models, selection={"passes": "one", "rule": "full", "retention_ratio": 1.0}, **sections)
    assert planned(config).max_tokens == ALWAYS


def test_auto_holds_what_fits_into_memory(models: Path):
    """By hand: 6 layers of the student, whose layers keep 9 x 48 + 3 x 96 values of float32 per token."""
    layer = (2 * 12 + 12) * 4 + 12 * 4 + 3 * 96 + 4 * 48  # q, k, v; attention's output; SwiGLU; norms and inputs
    held = 6 * layer * 4
    small, large = (planned(configured(models), memory_gib=gib) for gib in (2.0, 3.0))
    free = 0.5 * 0.9 * 2**30  # a tenth is set aside, and half of the rest
    assert large.max_tokens - small.max_tokens == pytest.approx(free / held, abs=1)
    recomputed = configured(models, model={"recompute_activations": True})
    small, large = (planned(recomputed, memory_gib=gib) for gib in (2.0, 3.0))
    assert large.max_tokens - small.max_tokens == pytest.approx(free / (6 * 48 * 4), abs=1)
    assert planned(configured(models), memory_gib=1e-3).max_tokens == NEVER


def test_a_cut_must_save_less_than_a_forward_pass_costs(models: Path):
    assert planned(configured(models)).max_cut_share == pytest.approx(1 / 3)
    recomputed = configured(models, model={"recompute_activations": True})
    assert planned(recomputed).max_cut_share == pytest.approx(1 / 4)


def test_a_rule_that_keeps_all_tokens_is_expected_to_cut_none_of_them(models: Path):
    config = configured(models, selection={"rule": "full", "retention_ratio": 0.05}, rollout={"importance_cap": 2.0})
    assert planned(config).asked_share == 1.0


def test_the_cut_is_expected_to_leave_out_the_reciprocal_of_the_ratio():
    batch = batch_of([100, 3, 0])  # prompts of 4, 5 and 6 tokens; nothing of the last goes through the model
    tokens = batch.num_model_tokens()
    assert tokens == (4 + 99) + (5 + 2)
    assert expected_cut_share(batch, 0.1) == pytest.approx((10 + 3) / tokens)
    assert expected_cut_share(batch, 1.0) == pytest.approx((1 + 1) / tokens)


def test_a_batch_takes_one_pass_if_its_fullest_replica_fits_and_little_is_cut():
    batch = batch_of([100, 40, 40], dp_size=2)
    fullest = max(batch.num_padded_tokens())
    share = expected_cut_share(batch, 0.1)
    assert OnePass(fullest, share, 0.1).suits(batch)
    assert not OnePass(fullest - 1, share, 0.1).suits(batch)
    assert not OnePass(fullest, share * 0.99, 0.1).suits(batch)
    assert not OnePass(0, 1.0, 0.1).suits(batch)


def test_whole_rollouts_that_are_dropped_are_cut_as_a_whole(models: Path):
    batch = batch_of([40, 40])
    assert OnePass(ALWAYS, 0.5, 0.5, of_whole_rollouts=True).suits(batch)
    assert not OnePass(ALWAYS, 0.49, 0.5, of_whole_rollouts=True).suits(batch)
    assert OnePass(ALWAYS, 0.49, 0.5).suits(batch)
    fire = {"passes": "auto", "rule": "fire", "retention_ratio": 0.8}
    assert planned(configured(models, selection=fire)).of_whole_rollouts
    assert not planned(configured(models)).of_whole_rollouts


def test_the_estimate_is_that_of_the_way_that_a_full_batch_takes(models: Path):
    held = "student: activations of a step, held"
    outline = outline_run(configured(models), 1, Machine(is_elsewhere=True))

    def estimated(passes: str, gib: float = 8.0) -> Any:
        config = configured(models, selection={"passes": passes})
        return estimate_memory(config, outline, gpu_memory_gib=gib, on_gpu=False)

    two, one, auto = (estimated(passes) for passes in ("two", "one", "auto"))
    assert auto.phases == one.phases
    assert held not in two.parts
    assert {phase for phase, parts in one.phases.items() if held in parts} == {"score", "train"}
    assert (two.held_tokens, one.held_tokens) == (0, auto.held_tokens)
    assert f"one pass fits for up to {auto.held_tokens:,} tokens per replica and step" in " ".join(auto.lines())
    full = one.phases["train"]
    longest = 64 + 64  # one rollout
    assert full[held] / longest == pytest.approx(6 * 672 * 4)
    assert held not in estimated("auto", 0.005).parts
    assert held in estimated("one", 0.005).parts


def test_auto_does_not_decide_what_an_auxiliary_loss_covers(tmp_path: Path):
    make_experts(tmp_path / "student", seed=1)
    make_experts(tmp_path / "teacher", seed=2)
    with_loss = {"model": {"moe_aux_loss_coeff": 0.1}}
    assert planned(configured(tmp_path)).max_tokens > NEVER
    assert planned(configured(tmp_path, **with_loss)).max_tokens == NEVER
    assert planned(configured(tmp_path, selection={"passes": "one"}, **with_loss)).max_tokens == ALWAYS


def test_held_activations_count_the_experts_of_each_token(tmp_path: Path):
    """By hand: a layer's heads, norms and inputs; a dense feed-forward part, or twice the inputs, products and outputs
    of two experts. Over two tensor-parallel ranks that share each expert, both have the inputs and outputs.
    """
    make_experts(tmp_path / "student", seed=1, mlp_only_layers=[0])
    make_experts(tmp_path / "teacher", seed=2)
    heads, norms = (12 + 2 * 4) * 8 + 12 * 8, 4 * 48
    for layout, shared in ((Layout(1), 1), (Layout(2, student=(2, 1), sequence_parallel=True), 2)):
        experts = 2 * (2 * 48 * shared + 3 * 24)
        values = 4 * (heads + norms) + 3 * 96 + 3 * experts
        small, large = (
            planned(configured(tmp_path, layout), layout.world_size, memory_gib=gib).max_tokens for gib in (2.0, 3.0)
        )
        free = 0.5 * 0.9 * 2**30
        assert large - small == pytest.approx(free / (values / layout.student[0] * 4), abs=1)
