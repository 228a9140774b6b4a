"""Which experts a config.json describes, and where they lie in transformers' fused tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.experts import fused_place, split_experts
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.errors import WeightsError
from tests.helpers.models import EXPERT_VARIANTS, VARIANTS, write_tiny_model

MIXED = "qwen3moe_with_dense_layers"


def described(**changes: Any) -> ModelArchitecture:
    config = EXPERT_VARIANTS[MIXED].to_dict() | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8} | changes
    if "num_local_experts" not in changes:
        del config["num_local_experts"]  # transformers writes it, published models have the other
    return ModelArchitecture.from_config(config, "config.json")


def test_layers_are_dense_by_step_or_by_name() -> None:
    architecture = described(num_hidden_layers=6)
    assert [architecture.has_experts(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert described(mlp_only_layers=[0, 1, 2, 3]).experts is None, "no layer has any"


def test_dropped_layers_take_their_kind_along(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, MIXED)
    checkpoint = HfCheckpoint(folder, drop_layers=[0, 2])
    assert [checkpoint.architecture.has_experts(layer) for layer in range(2)] == [True, False]
    again = ModelArchitecture.from_config(checkpoint.config, "config.json")
    assert again == checkpoint.architecture, "the export's config.json says the same"
    name = "model.layers.0.mlp.experts.7.up_proj.weight"
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.experts.7.up_proj.weight"]
    assert torch.equal(checkpoint.read(name), stored)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_experts": 0}, "num_experts to be a whole number"),
        ({"num_experts": "8"}, "transformers refuses it"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok to be a whole number from 1 to 8, got 9"),
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "norm_topk_prob = false with num_experts_per_tok = 1"),
        ({"num_local_experts": 4, "num_experts": 8}, "num_experts or num_local_experts, got both"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size to be a whole number"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step to be a whole number"),
        ({"use_sliding_window": True, "sliding_window": 4}, "full attention in every layer, got sliding_window = 4"),
    ],
)
def test_what_we_cannot_build_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        described(**changes)


def test_a_shared_expert_is_its_familys_alone() -> None:
    config = EXPERT_VARIANTS["qwen2moe_shared"].to_dict() | {"architectures": ["Qwen2MoeForCausalLM"]}
    read = ModelArchitecture.from_config(config, "config.json")
    assert read.experts is not None
    assert (read.experts.shared_ffn_hidden_size, read.qkv_bias) == (20, True)
    assert not ModelArchitecture.from_config(config | {"qkv_bias": False}, "config.json").qkv_bias
    dense = VARIANTS["qwen2_tied"].to_dict() | {"architectures": ["Qwen2ForCausalLM"], "qkv_bias": False}
    assert ModelArchitecture.from_config(dense, "config.json").qkv_bias, "transformers ignores it there"
    with pytest.raises(WeightsError, match="shared_expert_intermediate_size to be a whole number"):
        ModelArchitecture.from_config(config | {"shared_expert_intermediate_size": 0}, "config.json")
    other = described(shared_expert_intermediate_size=20).experts
    assert other is not None
    assert other.shared_ffn_hidden_size == 0, "transformers ignores it there"


def fuse(folder: Path) -> dict[str, torch.Tensor]:
    """Rewrites the weights in `folder` in transformers' fused spelling; returns them as they were."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    whole = {name: tensor for name, tensor in stored.items() if fused_place(name, 12) is None}
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            [stored[f"{name}.{number}.{kind}_proj.weight"] for number in range(8)] for kind in ("gate", "up", "down")
        )
        whole[f"{name}.gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], dim=1)
        whole[f"{name}.down_proj"] = torch.stack(down)
    save_file(whole, path, metadata={"format": "pt"})
    return stored


def test_fused_experts_are_read_as_single_ones(tmp_path: Path) -> None:
    stored = fuse(write_tiny_model(tmp_path, "qwen3moe_normalised"))
    checkpoint = HfCheckpoint(tmp_path)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    assert torch.equal(checkpoint.read_rows(name, 3, 7), stored[name][3:7])
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    assert torch.equal(checkpoint.read_columns(name, 3, 7), stored[name][:, 3:7])


def test_split_and_place_agree() -> None:
    fused = torch.arange(2 * 6 * 4).view(2, 6, 4)
    parts = split_experts("model.layers.0.mlp.experts.gate_up_proj", fused)
    assert len(parts) == 4
    for name, part in parts.items():
        place = fused_place(name, 3)
        assert place is not None
        assert torch.equal(fused[place.expert, place.rows], part)
    assert split_experts("model.layers.0.mlp.gate_up_proj", fused) == {}


@pytest.mark.parametrize(
    "change,message",
    [
        ("missing", r"expected a tensor model.layers.1.mlp.experts.3.up_proj.weight, found none \(1 are missing\)"),
        ("misnamed", r"expected a tensor model.layers.1.mlp.experts.3.up_proj.weight, found none"),
        ("too many", r"also found model.layers.1.mlp.experts.8.up_proj.weight"),
        ("both spellings", r"also found model.layers.1.mlp.experts.down_proj"),
        ("fused of another size", r"expected model.layers.1.mlp.experts.down_proj of shape \(8, 32, 12\)"),
    ],
)
def test_missing_and_misnamed_experts_are_refused(tmp_path: Path, change: str, message: str) -> None:
    path = write_tiny_model(tmp_path, "qwen3moe_normalised") / "model.safetensors"
    weights = load_file(path)
    expert = "model.layers.1.mlp.experts"
    name = f"{expert}.3.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "misnamed":
        weights[name.replace("up_proj", "w3")] = weights.pop(name)
    elif change == "too many":
        weights[name.replace(".3.", ".8.")] = weights[name].clone()
    elif change == "both spellings":
        weights[f"{expert}.down_proj"] = torch.zeros(8, 32, 12)
    else:
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith(expert) or "down" not in key}
        weights[f"{expert}.down_proj"] = torch.zeros(7, 32, 12)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=message):
        HfCheckpoint(tmp_path)
