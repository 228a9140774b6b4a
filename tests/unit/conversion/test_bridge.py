"""The names of Transformer Engine's experts, whose layers cannot be built without a GPU."""

from pathlib import Path
from typing import Any

import torch

from megatron_tip.conversion.bridge import local_parameters
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import ModelGroups
from tests.helpers.models import write_tiny_model


def stage_with(parameters: dict[str, torch.nn.Parameter]) -> Any:
    """A model of one layer, the second of the whole model, with parameters of these names within it."""
    model: Any = torch.nn.Module()
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.decoder.layers[0].layer_number = 2
    for name, parameter in parameters.items():
        *folders, last = name.split(".")
        module: Any = model.decoder.layers[0]
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, torch.nn.Module())
            module = getattr(module, folder)
        module.register_parameter(last, parameter)
    return model


def test_grouped_and_single_experts_have_the_same_maps(tmp_path: Path) -> None:
    architecture = HfCheckpoint(write_tiny_model(tmp_path, "qwen3moe_normalised")).architecture
    second_half: Any = ModelGroups(ModelGrid(1, 1, 2, ep_size=2), None, rank=1)  # type: ignore[arg-type]
    names = [
        {"single": "mlp.experts.local_experts.3.linear_fc1.weight", "grouped": "mlp.experts.linear_fc1.weight3"},
        {"single": "mlp.experts.local_experts.0.linear_fc2.weight", "grouped": "mlp.experts.linear_fc2.weight0"},
    ]
    for kind in ("single", "grouped"):
        model = stage_with({name[kind]: torch.nn.Parameter(torch.zeros(1)) for name in names})
        maps = [weight for _, _, weight in local_parameters(model, architecture, second_half)]
        assert [weight.name for weight in maps] == [
            "decoder.layers.1.mlp.experts.7.linear_fc1.weight",
            "decoder.layers.1.mlp.experts.4.linear_fc2.weight",
        ]
        assert [weight.expert for weight in maps] == [7, 4]
