"""Tokens a second, operations and utilisation, against numbers counted by hand."""

import pytest
import torch

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_size import forward_flops, head_flops, layer_parameters
from megatron_tip.training.throughput import Throughput, peak_tflops_of

TINY = ModelArchitecture.from_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    },
    "tiny",
)
STEP = {
    "rollout/num_rollouts": 5.0,
    "rollout/num_empty": 1.0,
    "rollout/response_tokens": 80.0,
    "train/num_model_tokens_uncut": 120.0,
    "train/num_model_tokens": 60.0,
    "selection/num_valid": 80.0,
    "selection/num_selected": 8.0,
    "time/rollout_seconds": 4.0,
    "time/teacher_seconds": 0.5,
    "time/score_seconds": 0.75,
    "time/train_seconds": 1.5,
    "time/heldout_seconds": 100.0,
    "time/sync_seconds": 1.25,
}


def test_a_forward_pass_is_counted_by_its_matrix_products():
    # q, k, v, o: 8x8 + 8x4 + 8x4 + 8x8; gate, up, down: 3 x 8x16; attention: 2 products, 4 heads of 2, half of 30
    products = 64 + 32 + 32 + 64 + 3 * 128
    assert layer_parameters(TINY) == products + 2 * 8
    attention = 2 * (4 * 2) * 30 / 2
    assert forward_flops(TINY, num_tokens=10, mean_length=30) == 2 * 2 * (products + attention) * 10
    assert head_flops(TINY, num_rows=3) == 2 * 8 * 100 * 3


def test_speed_by_phase():
    metrics = Throughput(TINY, TINY, world_size=2, peak_tflops=0.0).metrics(STEP)
    assert metrics["perf/rollout_tokens_per_second"] == 20.0
    assert metrics["perf/teacher_tokens_per_second"] == 240.0
    assert metrics["perf/score_tokens_per_second"] == 160.0
    assert metrics["perf/train_tokens_per_second"] == 40.0
    assert metrics["perf/step_tokens_per_second"] == 10.0  # held-out measurements are no part of a step
    assert not any(name.endswith("mfu") for name in metrics)


def test_utilisation_is_over_the_workers_and_their_peak():
    metrics = Throughput(TINY, TINY, world_size=2, peak_tflops=1e-6).metrics(STEP)
    teacher = forward_flops(TINY, num_tokens=120, mean_length=120 / 4)
    assert metrics["perf/teacher_tflops_per_rank"] == pytest.approx(teacher / 0.5 / 2 / 1e12)
    assert metrics["perf/teacher_mfu"] == pytest.approx(teacher / 0.5 / 2 / 1e12 / 1e-6)
    train = 3 * forward_flops(TINY, num_tokens=60, mean_length=30) + 4 * head_flops(TINY, num_rows=8)
    assert metrics["perf/train_tflops_per_rank"] == pytest.approx(train / 1.5 / 2 / 1e12)


def test_a_held_forward_pass_is_no_work_of_the_training():
    speed = Throughput(TINY, TINY, world_size=2, peak_tflops=0.0)
    held = speed.metrics(STEP | {"train/one_pass": 1.0})
    both = speed.metrics(STEP | {"train/one_pass": 0.0})
    forward = forward_flops(TINY, num_tokens=60, mean_length=30)
    assert both["perf/train_tflops_per_rank"] == speed.metrics(STEP)["perf/train_tflops_per_rank"]
    difference = both["perf/train_tflops_per_rank"] - held["perf/train_tflops_per_rank"]
    assert difference == pytest.approx(forward / 1.5 / 2 / 1e12)
    assert held["perf/score_tflops_per_rank"] == both["perf/score_tflops_per_rank"]


def test_what_was_not_counted_is_left_out():
    metrics = Throughput(TINY, TINY, world_size=1, peak_tflops=1.0).metrics({"time/heldout_seconds": 3.0})
    assert metrics == {}


def test_a_cpu_has_no_peak():
    assert peak_tflops_of(torch.device("cpu")) == 0.0
