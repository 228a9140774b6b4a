"""A model's architecture, read from its Hugging Face config.json and checked against what we can build."""

import copy
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from megatron_tip.conversion.experts import Experts, config_of_layers, read_experts
from megatron_tip.errors import DroppedLayersError, WeightsError

MAX_SIZE = 10**9
MAX_LAYERS = 10_000
"""Sizes beyond these are mistakes; they are refused before anything is made of them."""


@dataclass(frozen=True)
class Family:
    """What a Hugging Face class adds to the common decoder: rotary GPT with RMSNorm, grouped queries and SwiGLU.

    `name`: the `model_type` of its config.json. `config_class`: how transformers reads that file. `experts`: layers may
    have experts instead of one feed-forward part. `shared_expert`: and beside them one for every token.
    """

    name: str
    config_class: type[PretrainedConfig]
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    shared_expert: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("llama", LlamaConfig),
    "Qwen2ForCausalLM": Family("qwen2", Qwen2Config, qkv_bias=True),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", Qwen2MoeConfig, qkv_bias=True, experts=True, shared_expert=True),
    "Qwen3ForCausalLM": Family("qwen3", Qwen3Config, qk_norm=True),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", Qwen3MoeConfig, qk_norm=True, experts=True),
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
    """The shape of a model: everything that `build_gpt` and the weight map need.

    `ffn_hidden_size`: of the layers without experts. `experts`: None if no layer has any.
    """

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
    experts: Experts | None = None

    def has_experts(self, layer: int) -> bool:
        """Returns whether a layer, counted from 0, has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

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
        sizes = {key: _size(config, key, where) for key in _SIZES}
        read = _as_transformers_reads(config, family, where)
        _refuse_unsupported_features(config, read, where)
        heads = sizes["num_attention_heads"]
        query_groups = read.num_key_value_heads
        head_dim = getattr(read, "head_dim", None) or sizes["hidden_size"] // heads
        if heads % query_groups:
            raise WeightsError(
                f"{where}: expected num_attention_heads to be a multiple of num_key_value_heads, got {heads} and "
                f"{query_groups}"
            )
        return cls(
            family=family.name,
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            ffn_hidden_size=sizes["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=query_groups,
            head_dim=head_dim,
            vocab_size=sizes["vocab_size"],
            max_position_embeddings=sizes["max_position_embeddings"],
            norm_eps=float(read.rms_norm_eps),
            rope_theta=float(read.rope_parameters["rope_theta"]),
            rope_scaling=_rope_scaling(read.rope_parameters, where),
            tied_embeddings=bool(read.tie_word_embeddings),
            qkv_bias=_has_qkv_bias(read, family),
            qk_norm=family.qk_norm,
            experts=_experts(config, read, family, where),
        )

    def with_dropped_layers(self, drop_layers: Collection[int]) -> "ModelArchitecture":
        """Returns the same model without some layers; the remaining ones are renumbered from 0."""
        kept = kept_layers(self.num_layers, drop_layers)
        experts = self.experts.of_layers(kept) if self.experts else None
        return dataclasses.replace(self, num_layers=len(kept), experts=experts)


def kept_layers(num_layers: int, drop_layers: Collection[int]) -> list[int]:
    """Returns the numbers of the layers that stay, as counted in the checkpoint, in order.

    Raises:
        DroppedLayersError: a dropped layer does not exist or is named twice, or no layer would be left.
    """
    unknown = sorted(layer for layer in drop_layers if not 0 <= layer < num_layers)
    if unknown or len(set(drop_layers)) != len(drop_layers) or len(drop_layers) >= num_layers:
        raise DroppedLayersError(
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
    if {"decoder_sparse_step", "mlp_only_layers"} & config.keys():
        changed |= config_of_layers(config, kept)
    return changed


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _family(config: dict[str, Any], where: str) -> Family:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise WeightsError(
            f"{where}: expected architectures to be a list with one of {', '.join(sorted(FAMILIES))}, got {names!r:.80}"
        )
    if names[0] not in FAMILIES:
        raise WeightsError(
            f"{where}: architecture {names[0]} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[names[0]]
    if config.get("model_type") != family.name:
        raise WeightsError(
            f"{where}: expected model_type {family.name!r} for {names[0]}, got {config.get('model_type')!r:.80}; "
            "engines and other tools choose the model by it"
        )
    return family


def _size(config: dict[str, Any], key: str, where: str) -> int:
    value, most = config.get(key), MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
    if type(value) is not int or not 1 <= value <= most:
        raise WeightsError(f"{where}: expected {key} to be a whole number from 1 to {most}, got {value!r:.80}")
    return value


def _has_qkv_bias(read: Any, family: Family) -> bool:
    """Returns whether queries, keys and values have biases: the class says so, or a key that the class knows."""
    return family.qkv_bias and (read.qkv_bias if hasattr(family.config_class, "qkv_bias") else True)


def _experts(config: dict[str, Any], read: PretrainedConfig, family: Family, where: str) -> Experts | None:
    if not family.experts:
        return None
    return read_experts(config, read, config["num_hidden_layers"], where, with_shared=family.shared_expert)


def _as_transformers_reads(config: dict[str, Any], family: Family, where: str) -> PretrainedConfig:
    """Returns the configuration as transformers reads it: its defaults, and every spelling of the rotary parameters.

    Raises:
        WeightsError: transformers refuses it, or it describes the rotary embeddings twice.
    """
    own, added = config.get("rope_parameters"), config.get("rope_scaling")
    if own and added and own != added:
        raise WeightsError(
            f"{where}: expected rope_parameters or rope_scaling, got both; transformers reads rope_scaling alone and "
            "drops the rope_theta within rope_parameters: put everything into rope_parameters"
        )
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            raise WeightsError(f"{where}: expected {key} to be an object, got {config[key]!r:.80}")
    length, outer = (added or own or {}).get(_ORIGINAL), config.get(_ORIGINAL)
    if outer is not None and outer != length:
        raise WeightsError(
            f"{where}: expected {_ORIGINAL} within the rotary parameters alone, got {length!r:.80} there and "
            f"{outer!r:.80} beside them; which of them counts depends on how transformers loads the model"
        )
    values = {key: value for key, value in config.items() if key not in _NEVER_READ}
    try:
        return family.config_class.from_dict(copy.deepcopy(values))  # which writes into what it is given
    except Exception as error:  # of its own, of huggingface_hub's validation, or of Python
        reason = " ".join(str(error).split())
        raise WeightsError(f"{where}: transformers refuses it: {type(error).__name__}: {reason:.300}") from error


_ORIGINAL = "original_max_position_embeddings"
_NEVER_READ = ("auto_map", "quantization_config")
"""Names of code in the folder; and what is refused by name."""


def _refuse_unsupported_features(config: dict[str, Any], read: PretrainedConfig, where: str) -> None:
    def refuse(key: str, expected: str) -> None:
        got = getattr(read, key, config.get(key))
        raise WeightsError(f"{where}: expected {expected}, got {key} = {got!r:.80}; such models are not supported")

    if read.hidden_act != "silu":
        refuse("hidden_act", "the activation silu")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(read, key, False):
            refuse(key, "no bias in the output and feed-forward projections")
    if config.get("quantization_config"):
        refuse("quantization_config", "plain weights; dequantise them first")
    if any(kind != "full_attention" for kind in getattr(read, "layer_types", None) or ()):
        refuse("sliding_window", "full attention in every layer")
    for key, least in (("num_key_value_heads", 1), ("head_dim", 2)):
        value = getattr(read, key, None)
        if value is not None and (type(value) is not int or value < least):
            refuse(key, f"a whole number of at least {least}")
    if not isinstance(read.rms_norm_eps, int | float) or not 0 <= read.rms_norm_eps < 1:
        refuse("rms_norm_eps", "a small number")
    theta = read.rope_parameters.get("rope_theta")
    if not isinstance(theta, int | float) or not 0 < theta < float("inf"):
        raise WeightsError(f"{where}: expected rope_theta to be a positive number, got {theta!r:.80}")


def _rope_scaling(rope: dict[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type")
    if any(isinstance(value, dict) for value in rope.values()):
        raise WeightsError(f"{where}: expected one set of rotary parameters for all layers, got {rope}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise WeightsError(f"{where}: partial rotary embeddings are not supported, got {rope}")
    if kind == "default":
        return None
    if kind not in _ROPE_PARAMETERS:
        raise WeightsError(
            f"{where}: rope scaling {kind!r:.80} is not supported; supported are default, linear and llama3"
        )
    wrong = [key for key in _ROPE_PARAMETERS[kind] if not isinstance(rope.get(key), int | float) or rope[key] <= 0]
    if wrong:
        raise WeightsError(
            f"{where}: expected a positive number for {wrong[0]} of the rope scaling {kind!r}, got {rope}"
        )
    return RopeScaling(kind, **{key: rope[key] for key in _ROPE_PARAMETERS[kind]})


_ROPE_PARAMETERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
