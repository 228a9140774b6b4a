"""Layouts that a model cannot take."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.known_models import KNOWN_MODELS
from megatron_tip.errors import ConfigError, OptionalDependencyError
from megatron_tip.models import gpt
from megatron_tip.models.gpt import Fp8, _transformer_config, resolve_transformer_impl
from megatron_tip.models.layout import check_layout
from megatron_tip.models.transformer_engine import has_transformer_engine, transformer_engine_block
from megatron_tip.parallel.grid import ModelGrid

SMOLLM2 = ModelArchitecture.from_config(
    LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ).to_dict()
    | {"architectures": ["LlamaForCausalLM"]},
    "SmolLM2",
)


@pytest.mark.parametrize("tp_size,pp_size", [(1, 1), (3, 1), (1, 2), (3, 2), (3, 30)])
def test_layouts_that_fit(tp_size: int, pp_size: int) -> None:
    check_layout(SMOLLM2, tp_size=tp_size, pp_size=pp_size, owner="student")


@pytest.mark.parametrize(
    "tp_size,pp_size,message",
    [
        (2, 1, "teacher.tensor_parallel_size: expected a divisor of its 9 attention heads, got 2; choose among 1, 3"),
        (9, 1, "teacher.tensor_parallel_size: expected a divisor of its 3 key/value heads, got 9; choose among 1, 3"),
        (1, 4, "teacher.pipeline_parallel_size: expected a divisor of its 30 layers, got 4; choose among 1, 2, 3, 5"),
        (9, 1, "choose among 1, 3; Megatron-Core 0.16.1 gives several ranks one of these heads only within its global"),
    ],
)
def test_layouts_that_do_not(tp_size: int, pp_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(SMOLLM2, tp_size=tp_size, pp_size=pp_size, owner="teacher")


@pytest.mark.parametrize("layers", [(10, 20), (10, 10, 9), (0, 15, 15), (10, 10, 10, 0)])
def test_stages_that_are_not_the_layers(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"model.pipeline_layers: expected 3 numbers .* the 30 layers, got \["):
        check_layout(SMOLLM2, tp_size=1, pp_size=3, owner="model", pipeline_layers=layers)
    check_layout(SMOLLM2, tp_size=1, pp_size=3, owner="model", pipeline_layers=(11, 11, 8))


def test_experts_are_laid_out_over_divisors_of_them() -> None:
    architecture = KNOWN_MODELS["Qwen3-30B-A3B"].architecture
    check_layout(architecture, tp_size=4, pp_size=2, owner="model", ep_size=64, expert_tp_size=1)
    message = "model.expert_model_parallel_size: expected a divisor of its 128 experts, got 3; choose among 1, 2, 4"
    with pytest.raises(ConfigError, match=message):
        check_layout(architecture, tp_size=1, pp_size=1, owner="model", ep_size=3)
    message = (
        "model.expert_tensor_parallel_size: expected a divisor of its 768 feed-forward channels of an expert, got 5"
    )
    with pytest.raises(ConfigError, match=message):
        check_layout(architecture, tp_size=1, pp_size=1, owner="model", expert_tp_size=5)
    assert architecture.experts is not None
    shared = replace(architecture, experts=replace(architecture.experts, shared_ffn_hidden_size=6))
    message = "teacher.tensor_parallel_size: expected a divisor of its 6 feed-forward channels of the shared expert"
    with pytest.raises(ConfigError, match=message):
        check_layout(shared, tp_size=4, pp_size=1, owner="teacher")
    with pytest.raises(ConfigError, match=r"teacher.expert_model_parallel_size: expected a model with experts, got 2"):
        check_layout(SMOLLM2, tp_size=1, pp_size=1, owner="teacher", ep_size=2)


@pytest.mark.parametrize("dtype,expected", [(torch.bfloat16, "transformer_engine"), (torch.float32, "local")])
def test_auto_on_a_gpu_goes_by_what_transformer_engine_has_kernels_for(
    dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_transformer_impl("auto", dtype) == expected


@pytest.mark.parametrize("fp8, expected", [("none", None), ("hybrid", "hybrid")])
def test_products_in_8_bits_are_megatrons(fp8: Fp8, expected: str | None) -> None:
    groups: Any = SimpleNamespace(grid=ModelGrid(1, 1, 1, cp_size=2))
    types: Any = {"dtype": torch.bfloat16, "use_transformer_engine": True, "sequence_parallel": False}
    config = _transformer_config(SMOLLM2, groups, **types, fp8=fp8)
    assert (config.fp8, config.fp8_recipe, config.context_parallel_size) == (expected, "tensorwise", 2)


@pytest.mark.skipif(has_transformer_engine(), reason="Transformer Engine is installed")
def test_transformer_engine_that_is_not_installed() -> None:
    assert resolve_transformer_impl("auto", torch.bfloat16) == "local"
    assert resolve_transformer_impl("transformer_engine", torch.bfloat16) == "transformer_engine"
    with pytest.raises(OptionalDependencyError, match=r"megatron_tip\[transformer-engine\]"):
        transformer_engine_block([0, 0], qk_norm=False)
