"""config.json to architecture: every form that checkpoints come in, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from megatron_tip.conversion.architecture import ModelArchitecture, RopeScaling, config_without_layers
from megatron_tip.errors import WeightsError

LLAMA_31: dict[str, Any] = {  # as published, before transformers 5
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def test_llama_3_1_as_published() -> None:
    architecture = ModelArchitecture.from_config(LLAMA_31, "config.json")
    assert architecture == ModelArchitecture(
        family="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
    )


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_what_transformers_writes_today_reads_as_what_it_wrote_before(config_class: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA_31["rope_scaling"]}
    config = config_class(
        num_attention_heads=8, num_key_value_heads=2, hidden_size=64, rope_parameters=rope, tie_word_embeddings=True
    )
    today = config.to_dict() | {"architectures": [config_class.__name__.replace("Config", "ForCausalLM")]}
    before = {key: value for key, value in today.items() if key != "rope_parameters"}
    before |= {"rope_theta": 1e6, "rope_scaling": LLAMA_31["rope_scaling"]}
    architecture = ModelArchitecture.from_config(today, "today")
    assert architecture == ModelArchitecture.from_config(before, "before")
    assert architecture.rope_theta == 1e6
    assert architecture.tied_embeddings


def test_sizes_that_old_checkpoints_leave_out() -> None:
    config = {key: value for key, value in LLAMA_31.items() if key not in ("num_key_value_heads", "rope_scaling")}
    del config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]
    architecture = ModelArchitecture.from_config(config, "llama-2")
    assert architecture.num_query_groups == 32
    assert architecture.rope_theta == 10000.0
    assert architecture.rope_scaling is None
    assert not architecture.tied_embeddings


def test_the_older_name_of_the_scaling_type() -> None:
    config = LLAMA_31 | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelArchitecture.from_config(config, "x").rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"architectures": "LlamaForCausalLM"}, "architectures to be a list.*'LlamaForCausalLM'"),
        ({"model_type": None}, "expected model_type 'llama'.*None"),
        ({"model_type": "mistral"}, "expected model_type 'llama'.*mistral"),
        ({"num_hidden_layers": 10**9}, "from 1 to 10000"),
        ({"num_hidden_layers": True}, "from 1 to 10000.*True"),
        ({"head_dim": "8"}, "transformers refuses it.*head_dim"),
        ({"num_key_value_heads": 5}, "multiple of num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"rope_theta": None}, "rope_theta to be a positive number, got None"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling to be an object, got 'linear'"),
        ({"rope_parameters": [1]}, "rope_parameters or rope_scaling, got both"),
        (
            {
                "rope_scaling": None,
                "rope_parameters": {"full_attention": {"rope_type": "default"}},
                "layer_types": ["full_attention"] * 32,
            },
            "rope",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "got both"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*Qwen2ForCausalLM, Qwen2MoeForCausalLM, Qwen3"),
        ({"architectures": None}, "architectures to be a list.*None"),
        ({"hidden_act": "gelu"}, "silu.*gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "dequantise"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*default, linear and llama3"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 16}, "full attention"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 16}, "full attention"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers.*'32'"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=f"(?s)config.json.*{message}"):
        ModelArchitecture.from_config(LLAMA_31 | change, "config.json")


def test_sliding_window_that_no_layer_uses_is_no_obstacle() -> None:
    config = LLAMA_31 | QWEN2 | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 16}
    assert ModelArchitecture.from_config(config, "x").num_layers == 32


def test_dropped_layers() -> None:
    architecture = ModelArchitecture.from_config(LLAMA_31, "x").with_dropped_layers((3, 31))
    assert architecture.num_layers == 30
    kinds = [f"kind_{layer}" for layer in range(32)]
    config = config_without_layers(LLAMA_31 | {"layer_types": kinds}, (3, 31))
    assert config["num_hidden_layers"] == 30
    assert config["layer_types"] == kinds[:3] + kinds[4:31]
    assert ModelArchitecture.from_config(config_without_layers(LLAMA_31, (3, 31)), "x") == architecture


@pytest.mark.parametrize("drop_layers", [(32,), (-1,), (3, 3), tuple(range(32))])
def test_layers_that_cannot_be_dropped(drop_layers: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match=r"drop_layers.*0\.\.31"):
        ModelArchitecture.from_config(LLAMA_31, "x").with_dropped_layers(drop_layers)
