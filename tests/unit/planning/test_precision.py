"""What needs Transformer Engine on a GPU is refused by name where it cannot run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.planning import precision
from megatron_tip.planning.precision import check_precision
from tests.helpers.training import Layout, make_config

PRECISE = {"use_precision_aware_optimizer": True, "distributed": True}
WIDE = ModelArchitecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=512,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
)


def config_of(**sections: dict[str, Any]) -> Config:
    auto = {"model": {"dtype": "auto"}, "teacher": {"dtype": "auto"}}
    return make_config(Path("models"), Layout(1), **{**auto, **sections})


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"optimizer": {"exp_avg_dtype": "fp8"}}, 'optimizer.exp_avg_dtype: expected "fp32" without .* got "fp8"'),
        ({"optimizer": PRECISE | {"distributed": False}}, "expected optimizer.distributed = true"),
        ({"optimizer": PRECISE, "model": {"dtype": "float32"}}, 'model.dtype = "bfloat16" or "auto", got "float32"'),
        ({"teacher": {"fp8": "hybrid", "dtype": "float32"}}, 'teacher.dtype = "float32", got "hybrid"; only Trans'),
        ({"teacher": {"fp8": "e4m3", "dtype": "auto", "transformer_impl": "local"}}, 'transformer_impl = "local"'),
        (
            {"teacher": {"fp8": "e4m3", "kind": "sglang", "urls": ("http://127.0.0.1:1",)}},
            'teacher.fp8: expected "none" with teacher.kind = "sglang", got "e4m3"',
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_anywhere(sections: dict[str, Any], message: str):
    config = config_of(**sections)
    teacher = WIDE if config.teacher.kind == "megatron" else None
    with pytest.raises(ConfigError, match=message):
        check_precision(config, teacher, Machine(is_elsewhere=True))


@pytest.mark.parametrize(
    "sections, setting",
    [
        ({"optimizer": PRECISE}, "optimizer.use_precision_aware_optimizer: expected false"),
        ({"teacher": {"fp8": "hybrid", "dtype": "auto"}}, 'teacher.fp8: expected "none", got "hybrid"'),
    ],
)
def test_a_machine_says_what_it_lacks(sections: dict[str, Any], setting: str, monkeypatch: pytest.MonkeyPatch):
    config = config_of(**sections)
    check_precision(config, WIDE, Machine(is_elsewhere=True))
    with pytest.raises(ConfigError, match=f"{setting} without a GPU"):
        check_precision(config, WIDE, Machine())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(ConfigError, match=f"{setting} without Transformer Engine; install the extra"):
        check_precision(config, WIDE, Machine())
    monkeypatch.setattr(precision, "find_spec", lambda _: object())
    if config.teacher.fp8 == "none":
        check_precision(config, WIDE, Machine())
    else:
        with pytest.raises(ConfigError, match=f"{setting}; A100 has no products in 8 bits"):
            check_precision(config, WIDE, Machine())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_precision(config, WIDE, Machine())


@pytest.mark.parametrize(
    "shape, tp_size, message",
    [
        ({"hidden_size": 72}, 1, "a teacher with 72 hidden channels"),
        ({"head_dim": 12}, 2, "a teacher with 24 attention channels per rank"),
        ({}, 4, "a teacher with 24 feed-forward channels per rank"),
        ({}, 2, None),
    ],
)
def test_products_in_8_bits_want_widths_that_they_can_take(shape: dict[str, int], tp_size: int, message: str | None):
    config = config_of(teacher={"fp8": "hybrid", "dtype": "auto", "tensor_parallel_size": tp_size})
    if message is None:
        check_precision(config, replace(WIDE, **shape), Machine(is_elsewhere=True))
        return
    with pytest.raises(
        ConfigError, match=f'teacher.fp8: expected "none" for {message}, got "hybrid"; .*multiple of 16'
    ):
        check_precision(config, replace(WIDE, **shape), Machine(is_elsewhere=True))
