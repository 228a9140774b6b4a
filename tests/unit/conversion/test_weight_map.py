"""The weight map's names and shapes against transformers' own, and the one name function."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.experts import split_experts
from megatron_tip.conversion.weight_map import checkpoint_name, hf_shapes, weight_maps
from tests.helpers.models import EXPERT_VARIANTS, VARIANTS


@pytest.mark.parametrize("variant", [*VARIANTS, *EXPERT_VARIANTS])
def test_every_tensor_of_transformers_is_mapped_once_with_its_shape(variant: str) -> None:
    config = (VARIANTS | EXPERT_VARIANTS)[variant]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    saved = [split_experts(name, parameter) or {name: parameter} for name, parameter in model.named_parameters()]
    expected = {name: tuple(tensor.shape) for tensors in saved for name, tensor in tensors.items()}
    architecture = ModelArchitecture.from_config(config.to_dict() | {"architectures": [type(model).__name__]}, variant)
    assert hf_shapes(architecture) == expected
    names = [name for weight in weight_maps(architecture) for name in weight.hf_names]
    assert len(names) == len(expected)


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_local_and_transformer_engine_names_come_to_the_same(layers: str) -> None:
    names = {
        "local": ["input_layernorm.weight", "pre_mlp_layernorm.weight"],
        "transformer_engine": ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"],
    }
    fused = [f"decoder.layers.7.{name}" for name in names["transformer_engine"]]
    assert [checkpoint_name(f"decoder.layers.7.{name}") for name in names[layers]] == fused
    for name in ("decoder.layers.7.self_attention.q_layernorm.weight", "decoder.final_layernorm.weight"):
        assert checkpoint_name(name) == name
