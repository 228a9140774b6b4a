"""The shipped shapes give the parameter counts that their safetensors files have."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.known_models import KNOWN_MODELS, known_model
from megatron_tip.conversion.model_size import num_parameters
from megatron_tip.errors import ConfigError


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_shape_has_the_published_number_of_parameters(name: str):
    known = KNOWN_MODELS[name]
    assert num_parameters(known.architecture) == known.num_parameters
    assert known.tokenizer.largest_id < known.architecture.vocab_size


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model_itself(model_type: str, tied: bool):
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=3,
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        vocab_size=90,
        tie_word_embeddings=tied,
    )
    if model_type == "qwen3_moe":
        config.update({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]})
    if model_type == "qwen2":
        config.head_dim = 12  # its head size follows from the hidden size
    model = AutoModelForCausalLM.from_config(config)
    architecture = ModelArchitecture.from_config(
        {**config.to_dict(), "architectures": [type(model).__name__]}, model_type
    )
    assert num_parameters(architecture) == model.num_parameters()


@pytest.mark.parametrize("name,active", [("Qwen3-30B-A3B", 3.3e9), ("Qwen3-235B-A22B", 22e9)])
def test_active_parameters_are_those_of_the_model_card(name: str, active: float):
    assert num_parameters(KNOWN_MODELS[name].architecture, active=True) == pytest.approx(active, rel=0.02)


def test_a_folder_is_known_by_its_name():
    assert known_model(Path("/models/Qwen3-4B"), owner="model") is KNOWN_MODELS["Qwen3-4B"]
    assert known_model(Path("/models/Qwen2.5-3B-Instruct"), owner="model") is KNOWN_MODELS["Qwen2.5-3B"]
    with pytest.raises(ConfigError, match=r"teacher.path: .*/models/Qwen3-15B; known are Qwen3-0.6B, "):
        known_model(Path("/models/Qwen3-15B"), owner="teacher")
