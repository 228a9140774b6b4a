"""A model's architecture, read from its Hugging Face config.json and checked against what we can build."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from megatron_tip.errors import WeightsError


@dataclass(frozen=True)
class Family:
    """The features that a Hugging Face class adds to a rotary GPT with RMSNorm, grouped queries and SwiGLU."""

    name: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True),
}


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies beyond the pretraining length.

    `kind` "linear" divides them by `factor`; "llama3" divides the long wavelengths by `factor`, keeps the short ones
    and blends in between (`low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelArchitecture:
    """The shape of a model: everything that `build_gpt` and the weight map need."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    def differences(self, got: "ModelArchitecture") -> list[str]:
        """Returns the fields that differ in `got`, as "num_layers: expected 24, got 29"."""
        pairs = [(name, getattr(self, name), getattr(got, name)) for name in self.__dataclass_fields__]
        return [f"{name}: expected {own!r}, got {other!r}" for name, own, other in pairs if own != other]

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> "ModelArchitecture":
        """Returns the architecture of a config.json's content; `where` names it in errors.

        Raises:
            WeightsError: the architecture or one of its features is not supported, or a size is missing.
        """
        family = _family(config, where)
        _refuse_unsupported_features(config, where)
        heads = _size(config, "num_attention_heads", where)
        hidden_size = _size(config, "hidden_size", where)
        rope = _rope_parameters(config)
        return cls(
            family=family.name,
            num_layers=_size(config, "num_hidden_layers", where),
            hidden_size=hidden_size,
            ffn_hidden_size=_size(config, "intermediate_size", where),
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden_size // heads,
            vocab_size=_size(config, "vocab_size", where),
            max_position_embeddings=_size(config, "max_position_embeddings", where),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            rope_scaling=_rope_scaling(rope, where),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
        )

    def with_dropped_layers(self, drop_layers: Collection[int]) -> "ModelArchitecture":
        """Returns the same model without some layers; the remaining ones are renumbered from 0."""
        return dataclasses.replace(self, num_layers=len(kept_layers(self.num_layers, drop_layers)))


def kept_layers(num_layers: int, drop_layers: Collection[int]) -> list[int]:
    """Returns the numbers of the layers that stay, as counted in the checkpoint, in order.

    Raises:
        WeightsError: a dropped layer does not exist or is named twice, or no layer would be left.
    """
    unknown = sorted(layer for layer in drop_layers if not 0 <= layer < num_layers)
    if unknown or len(set(drop_layers)) != len(drop_layers) or len(drop_layers) >= num_layers:
        raise WeightsError(
            f"drop_layers: expected different layers among 0..{num_layers - 1}, at least one of them kept, "
            f"got {list(drop_layers)}"
        )
    return [layer for layer in range(num_layers) if layer not in drop_layers]


def config_without_layers(config: dict[str, Any], drop_layers: Collection[int]) -> dict[str, Any]:
    """Returns a copy of a config.json's content that describes the model without some layers."""
    kept = kept_layers(config["num_hidden_layers"], drop_layers)
    changed = {**config, "num_hidden_layers": len(kept)}
    if config.get("layer_types"):
        changed["layer_types"] = [config["layer_types"][layer] for layer in kept]
    return changed


def _family(config: dict[str, Any], where: str) -> Family:
    names = config.get("architectures") or ["(none named)"]
    if names[0] not in FAMILIES:
        raise WeightsError(
            f"{where}: architecture {names[0]} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[names[0]]


def _size(config: dict[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise WeightsError(f"{where}: expected {key} to be a positive whole number, got {value!r}")
    return value


def _refuse_unsupported_features(config: dict[str, Any], where: str) -> None:
    def refuse(key: str, expected: str) -> None:
        raise WeightsError(
            f"{where}: expected {expected}, got {key} = {config.get(key)!r}; such models are not supported"
        )

    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "the activation silu")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            refuse(key, "no bias in the output and feed-forward projections")
    if config.get("quantization_config"):
        refuse("quantization_config", "plain weights; dequantise them first")
    if _uses_sliding_window(config):
        refuse("sliding_window", "full attention in every layer")


def _uses_sliding_window(config: dict[str, Any]) -> bool:
    layer_types = config.get("layer_types")
    if layer_types:
        return any(kind != "full_attention" for kind in layer_types)
    limited = config.get("use_sliding_window") and config.get("sliding_window") is not None
    return bool(limited) and config.get("max_window_layers", 28) < config["num_hidden_layers"]


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `rope_parameters` (transformers 5), or the same from an older `rope_theta` and `rope_scaling`."""
    if config.get("rope_parameters"):
        return config["rope_parameters"]
    parameters = dict(config.get("rope_scaling") or {})
    if "rope_theta" in config:
        parameters["rope_theta"] = config["rope_theta"]
    return parameters


def _rope_scaling(rope: dict[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise WeightsError(f"{where}: partial rotary embeddings are not supported, got {rope}")
    if kind == "default":
        return None
    if kind not in _ROPE_PARAMETERS:
        raise WeightsError(f"{where}: rope scaling {kind!r} is not supported; supported are default, linear and llama3")
    missing = [key for key in _ROPE_PARAMETERS[kind] if not isinstance(rope.get(key), int | float)]
    if missing:
        raise WeightsError(f"{where}: expected a number for {missing[0]} of the rope scaling {kind!r}, got {rope}")
    return RopeScaling(kind, **{key: rope[key] for key in _ROPE_PARAMETERS[kind]})


_ROPE_PARAMETERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
