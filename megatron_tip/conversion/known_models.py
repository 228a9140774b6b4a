"""The shapes of the papers' models, so that a configuration can be checked without their weights.

Each entry holds the values of its Hugging Face config.json, under that file's own keys; `source` names it. `tokenizer`
names a vocabulary that models share: equal names mean equal ids for every token.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_tip.conversion.architecture import FAMILIES, ModelArchitecture, config_without_layers
from megatron_tip.errors import ConfigError


@dataclass(frozen=True)
class KnownTokenizer:
    """A published tokenizer. `text_vocabulary`: tokenizers that share it differ only in special tokens."""

    name: str
    largest_id: int
    text_vocabulary: str


@dataclass(frozen=True)
class KnownModel:
    """A published model. `num_parameters`: counted in its safetensors files, a tied head once."""

    source: str
    config: dict[str, Any]
    tokenizer: KnownTokenizer
    num_parameters: int

    @cached_property
    def architecture(self) -> ModelArchitecture:
        return ModelArchitecture.from_config(self.config, self.source)


_QWEN3_TOKENS = KnownTokenizer("qwen3", 151_668, "qwen2")
_QWEN25_TOKENS = KnownTokenizer("qwen2.5", 151_664, "qwen2")
_R1_QWEN_TOKENS = KnownTokenizer("deepseek-r1-distill-qwen", 151_664, "qwen2")
_SMOLLM2_TOKENS = KnownTokenizer("smollm2", 49_151, "smollm2")
_LLAMA3_TOKENS = KnownTokenizer("llama3", 128_255, "llama3")


def _config(architecture: str, shape: tuple[int, ...], **others: Any) -> dict[str, Any]:
    layers, hidden, feed_forward, heads, groups, vocabulary, positions = shape
    return {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].name,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        **others,
    }


def _qwen3(name: str, shape: tuple[int, ...], num_parameters: int, *, tied: bool) -> KnownModel:
    config = _config(
        "Qwen3ForCausalLM", shape, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=tied
    )
    return KnownModel(f"huggingface.co/Qwen/{name}, config.json", config, _QWEN3_TOKENS, num_parameters)


def _qwen3_moe(name: str, shape: tuple[int, ...], expert_size: int, num_parameters: int) -> KnownModel:
    config = _config(
        "Qwen3MoeForCausalLM",
        shape,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=False,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=expert_size,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    return KnownModel(f"huggingface.co/Qwen/{name}, config.json", config, _QWEN3_TOKENS, num_parameters)


def _qwen2(
    source: str, shape: tuple[int, ...], num_parameters: int, *, tied: bool, tokenizer: KnownTokenizer = _QWEN25_TOKENS
) -> KnownModel:
    config = _config("Qwen2ForCausalLM", shape, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=tied)
    return KnownModel(f"huggingface.co/{source}, config.json", config, tokenizer, num_parameters)


def _llama3(
    name: str, shape: tuple[int, ...], num_parameters: int, *, tied: bool = False, factor: float = 8.0
) -> KnownModel:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = _config(
        "LlamaForCausalLM",
        shape,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling={**scaling, "original_max_position_embeddings": 8192},
        tie_word_embeddings=tied,
    )
    return KnownModel(f"huggingface.co/meta-llama/{name}, config.json", config, _LLAMA3_TOKENS, num_parameters)


KNOWN_MODELS = {
    # layers, hidden size, feed-forward size, heads, key/value heads, vocabulary, positions
    "Qwen3-0.6B": _qwen3("Qwen3-0.6B", (28, 1024, 3072, 16, 8, 151936, 40960), 596_049_920, tied=True),
    "Qwen3-1.7B": _qwen3("Qwen3-1.7B", (28, 2048, 6144, 16, 8, 151936, 40960), 1_720_574_976, tied=True),
    "Qwen3-4B": _qwen3("Qwen3-4B", (36, 2560, 9728, 32, 8, 151936, 40960), 4_022_468_096, tied=True),
    "Qwen3-8B": _qwen3("Qwen3-8B", (36, 4096, 12288, 32, 8, 151936, 40960), 8_190_735_360, tied=False),
    "Qwen3-14B": _qwen3("Qwen3-14B", (40, 5120, 17408, 40, 8, 151936, 40960), 14_768_307_200, tied=False),
    "Qwen3-32B": _qwen3("Qwen3-32B", (64, 5120, 25600, 64, 8, 151936, 40960), 32_762_123_264, tied=False),
    "Qwen3-30B-A3B": _qwen3_moe("Qwen3-30B-A3B", (48, 2048, 6144, 32, 4, 151936, 40960), 768, 30_532_122_624),
    "Qwen3-235B-A22B": _qwen3_moe("Qwen3-235B-A22B", (94, 4096, 12288, 64, 4, 151936, 40960), 1536, 235_093_634_560),
    "Qwen2.5-0.5B": _qwen2("Qwen/Qwen2.5-0.5B", (24, 896, 4864, 14, 2, 151936, 32768), 494_032_768, tied=True),
    "Qwen2.5-1.5B": _qwen2("Qwen/Qwen2.5-1.5B", (28, 1536, 8960, 12, 2, 151936, 131072), 1_543_714_304, tied=True),
    "Qwen2.5-3B": _qwen2("Qwen/Qwen2.5-3B", (36, 2048, 11008, 16, 2, 151936, 32768), 3_085_938_688, tied=True),
    "Qwen2.5-7B": _qwen2("Qwen/Qwen2.5-7B", (28, 3584, 18944, 28, 4, 152064, 131072), 7_615_616_512, tied=False),
    "Qwen2.5-14B": _qwen2("Qwen/Qwen2.5-14B", (48, 5120, 13824, 40, 8, 152064, 131072), 14_770_033_664, tied=False),
    "Qwen2.5-32B": _qwen2("Qwen/Qwen2.5-32B", (64, 5120, 27648, 40, 8, 152064, 131072), 32_763_876_352, tied=False),
    "Qwen2.5-72B": _qwen2("Qwen/Qwen2.5-72B", (80, 8192, 29568, 64, 8, 152064, 131072), 72_706_203_648, tied=False),
    "DeepSeek-R1-Distill-Qwen-14B": _qwen2(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
        (48, 5120, 13824, 40, 8, 152064, 131072),
        14_770_033_664,
        tied=False,
        tokenizer=_R1_QWEN_TOKENS,
    ),
    "Llama-3.2-1B": _llama3(
        "Llama-3.2-1B", (16, 2048, 8192, 32, 8, 128256, 131072), 1_235_814_400, tied=True, factor=32.0
    ),
    "Llama-3.2-3B": _llama3(
        "Llama-3.2-3B", (28, 3072, 8192, 24, 8, 128256, 131072), 3_212_749_824, tied=True, factor=32.0
    ),
    "Llama-3.1-8B-Instruct": _llama3("Llama-3.1-8B-Instruct", (32, 4096, 14336, 32, 8, 128256, 131072), 8_030_261_248),
    "SmolLM2-135M-Instruct": KnownModel(
        "huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, config.json",
        _config(
            "LlamaForCausalLM",
            (30, 576, 1536, 9, 3, 49152, 8192),
            rms_norm_eps=1e-5,
            rope_theta=1e5,
            tie_word_embeddings=True,
        ),
        _SMOLLM2_TOKENS,
        134_515_008,
    ),
    "Llama-3.3-70B-Instruct": _llama3(
        "Llama-3.3-70B-Instruct", (80, 8192, 28672, 64, 8, 128256, 131072), 70_553_706_496
    ),
}


def known_model(path: Path, *, owner: str, drop_layers: Collection[int] = ()) -> KnownModel:
    """Returns the known model after which a missing folder is named (`named_after`).

    `drop_layers`: those to leave out, as of `ModelFolder`.

    Raises:
        ConfigError: the folder has no known name. `owner` is "model" or "teacher".
        WeightsError: layers that the model does not have.
    """
    if known := named_after(path):
        return replace(known, config=config_without_layers(known.config, drop_layers)) if drop_layers else known
    raise ConfigError(
        f"{owner}.path: expected a folder with a config.json, which is enough for a check, or the name of a known "
        f"model, got {path}; known are {', '.join(KNOWN_MODELS)}"
    )


def named_after(path: Path) -> KnownModel | None:
    """Returns the known model whose name a folder has; "-Base" and "-Instruct" may be appended to it."""
    names = (path.name, path.name.removesuffix("-Base"), path.name.removesuffix("-Instruct"))
    return next((KNOWN_MODELS[name] for name in names if name in KNOWN_MODELS), None)
