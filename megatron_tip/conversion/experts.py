"""The experts of a model: their shape, read from config.json, and their names in Hugging Face checkpoints."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from megatron_tip.errors import WeightsError

MAX_EXPERTS = 100_000
"""More are a mistake, which is refused before anything is made of them."""


@dataclass(frozen=True)
class Experts:
    """The feed-forward experts of a model, the same in each layer that has them.

    `num_active`: how many of them each token passes through. `normalised`: their weights sum to 1, otherwise they are
    the router's probabilities among all experts. `dense_layers`: the layers with an ordinary feed-forward part instead.
    `shared_ffn_hidden_size`: of an expert beside them that every token passes through, with a gate; 0: there is none.
    """

    num_experts: int
    num_active: int
    ffn_hidden_size: int
    normalised: bool
    dense_layers: tuple[int, ...] = ()
    shared_ffn_hidden_size: int = 0

    def of_layers(self, kept: Sequence[int]) -> "Experts | None":
        """Returns the experts of a model with only the layers `kept`; None if none of these has experts."""
        dense = tuple(place for place, layer in enumerate(kept) if layer in self.dense_layers)
        return dataclasses.replace(self, dense_layers=dense) if len(dense) < len(kept) else None


def read_experts(
    config: dict[str, Any], read: PretrainedConfig, num_layers: int, where: str, *, with_shared: bool
) -> Experts | None:
    """Returns the experts that a config.json describes; None if every layer is dense.

    Args:
        config: the content of config.json. `read`: the same as transformers reads it.
        with_shared: the family has a shared expert; in any other transformers ignores its size.

    Raises:
        WeightsError: a size is missing or out of range, or a feature is not supported.
    """
    values: Any = read
    first, second = config.get("num_experts"), config.get("num_local_experts")
    if first is not None and second is not None and first != second:
        raise WeightsError(
            f"{where}: expected num_experts or num_local_experts, got both, {first!r:.80} and {second!r:.80}; "
            "transformers reads one of them"
        )
    num_experts = _whole(values, "num_experts", MAX_EXPERTS, where)
    num_active = _whole(values, "num_experts_per_tok", num_experts, where)
    normalised = values.norm_topk_prob
    if type(normalised) is not bool:
        raise WeightsError(f"{where}: expected norm_topk_prob to be true or false, got {normalised!r:.80}")
    if num_active == 1 and normalised:
        raise WeightsError(
            f"{where}: expected norm_topk_prob = false with num_experts_per_tok = 1, got true; every expert would have "
            "the weight 1, which Megatron's router refuses"
        )
    if values.use_sliding_window and values.sliding_window is not None:
        raise WeightsError(
            f"{where}: expected full attention in every layer, got sliding_window = {values.sliding_window!r:.80}; "
            "such models are not supported"
        )
    return Experts(
        num_experts=num_experts,
        num_active=num_active,
        ffn_hidden_size=_whole(values, "moe_intermediate_size", 10**9, where),
        normalised=normalised,
        dense_layers=_dense_layers(values, num_layers, where),
        shared_ffn_hidden_size=_whole(values, "shared_expert_intermediate_size", 10**9, where) if with_shared else 0,
    ).of_layers(range(num_layers))


def _dense_layers(values: Any, num_layers: int, where: str) -> tuple[int, ...]:
    step, dense = _whole(values, "decoder_sparse_step", num_layers, where), values.mlp_only_layers
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise WeightsError(f"{where}: expected mlp_only_layers to be a list of layers, got {dense!r:.80}")
    return tuple(layer for layer in range(num_layers) if layer in dense or (layer + 1) % step)


def config_of_layers(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Returns the keys of a config.json that say which of the layers `kept`, renumbered from 0, have no experts."""
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    changed = [place for place, layer in enumerate(kept) if layer in dense or (layer + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": changed}


def _whole(values: Any, key: str, most: int, where: str) -> int:
    value = getattr(values, key, None)
    if type(value) is not int or not 1 <= value <= most:
        raise WeightsError(f"{where}: expected {key} to be a whole number from 1 to {most}, got {value!r:.80}")
    return value


@dataclass(frozen=True)
class FusedPlace:
    """Where one expert's matrix lies in a tensor that holds all experts of a layer: `tensor[expert, rows]`."""

    name: str
    expert: int
    rows: slice


def fused_place(name: str, ffn_hidden_size: int) -> FusedPlace | None:
    """Returns where an expert's tensor lies in transformers' fused spelling; None for any other tensor.

    transformers 5 computes with `experts.gate_up_proj` `[experts, 2 x ffn, h]` and `experts.down_proj` `[experts, h,
    ffn]`. It saves each expert's matrices under their own names unless it is told to save its own format.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    experts, number, kind = match[1], int(match[2]), match[3]
    fused, place = next((fused, kinds.index(kind)) for fused, kinds in _FUSED.items() if kind in kinds)
    rows = slice(place * ffn_hidden_size, (place + 1) * ffn_hidden_size) if len(_FUSED[fused]) > 1 else slice(None)
    return FusedPlace(f"{experts}.{fused}", number, rows)


def split_experts(name: str, fused: Tensor) -> dict[str, Tensor]:
    """Returns each expert's matrices within one of transformers' fused tensors, as views by their own names.

    Empty for any other tensor.
    """
    experts, _, last = name.rpartition(".")
    if last not in _FUSED or not experts.endswith(".mlp.experts"):
        return {}
    kinds = _FUSED[last]
    return {
        f"{experts}.{number}.{kind}_proj.weight": part
        for number, expert in enumerate(fused)
        for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=True)
    }


_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""The last part of a fused tensor's name -> the matrices that it holds of each expert, one above the other."""
