"""For every key of config.json that changes logits: our logits are those of transformers, or the model is refused.

python -m tests.integration.test_config_keys    prints the table
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tip.conversion.bridge import load_hf
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.errors import MegatronTipError
from megatron_tip.models.gpt import build_gpt
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import build_groups
from tests.helpers.distributed import run_workers
from tests.helpers.models import hf_logits, megatron_logits, write_tiny_model

TOLERANCE = 1e-4
REMOVED = object()
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OLD: dict[str, Any] = {"rope_parameters": REMOVED}
CHANGES: dict[str, dict[str, Any]] = {
    "as transformers writes it": {},
    "rms_norm_eps = 0.1": {"rms_norm_eps": 0.1},
    "rms_norm_eps left out": {"rms_norm_eps": REMOVED},
    "rope_theta = 500, the old way": OLD | {"rope_theta": 500.0},
    "no rope_theta anywhere": OLD,
    "rope_theta as a whole number": OLD | {"rope_theta": 500},
    "rope_theta beside rope_parameters without it": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
    "rope_theta in both": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 70.0},
    "linear, the old way": OLD | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear in rope_parameters, base outside": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "rope_theta": 500.0,
    },
    "linear added to rope_parameters": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "llama3, the old way": OLD | {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3 without its original length": OLD
    | {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}},
    "llama3, the original length outside": OLD
    | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 32},
    "llama3 in rope_parameters": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
    "yarn, the old way": OLD | {"rope_scaling": YARN},
    "yarn added to rope_parameters": {"rope_scaling": YARN},
    "dynamic": OLD | {"rope_scaling": YARN | {"rope_type": "dynamic"}},
    "an empty rope_scaling": {"rope_scaling": {}},
    "rope_scaling null": {"rope_scaling": None},
    "partial_rotary_factor = 0.5": {"partial_rotary_factor": 0.5},
    "hidden_act = gelu": {"hidden_act": "gelu"},
    "hidden_act left out": {"hidden_act": REMOVED},
    "attention_bias = true": {"attention_bias": True},
    "mlp_bias = true": {"mlp_bias": True},
    "sliding window, from layer 1 on": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "layer_types": REMOVED,
    },
    "sliding window, after the last layer": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 9,
        "layer_types": REMOVED,
    },
    "a layer with sliding attention": {
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "head_dim left out": {"head_dim": REMOVED},
    "head_dim = 16": {"head_dim": 16},
    "num_key_value_heads left out": {"num_key_value_heads": REMOVED},
    "tie_word_embeddings reversed": {"tie_word_embeddings": "other"},
    "tie_word_embeddings left out": {"tie_word_embeddings": REMOVED},
    "model_type of another family": {"model_type": "mistral"},
    "model_type left out": {"model_type": REMOVED},
    "attention_dropout = 0.5": {"attention_dropout": 0.5},
    "pretraining_tp = 2": {"pretraining_tp": 2},
    "an unknown key": {"logit_scale": 3.0},
}
EXPERT_CHANGES: dict[str, dict[str, Any]] = {
    "num_experts_per_tok = 3": {"num_experts_per_tok": 3},
    "num_experts_per_tok = 1": {"num_experts_per_tok": 1},
    "num_experts_per_tok = 1, not normalised": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "num_experts_per_tok left out": {"num_experts_per_tok": REMOVED},
    "num_experts_per_tok = 9 of 8": {"num_experts_per_tok": 9},
    "norm_topk_prob = false": {"norm_topk_prob": False},
    "norm_topk_prob left out": {"norm_topk_prob": REMOVED},
    "num_experts = 4 of 8": {"num_experts": 4, "num_local_experts": REMOVED},
    "num_local_experts for num_experts": {"num_local_experts": 8, "num_experts": REMOVED},
    "num_local_experts = 4 beside num_experts": {"num_local_experts": 4, "num_experts": 8},
    "num_experts left out": {"num_experts": REMOVED, "num_local_experts": REMOVED},
    "moe_intermediate_size left out": {"moe_intermediate_size": REMOVED},
    "decoder_sparse_step = 2": {"decoder_sparse_step": 2},
    "decoder_sparse_step left out": {"decoder_sparse_step": REMOVED},
    "mlp_only_layers = [1]": {"mlp_only_layers": [1]},
    "mlp_only_layers null": {"mlp_only_layers": None},
    "router_aux_loss_coef = 0.5": {"router_aux_loss_coef": 0.5},
    "output_router_logits = true": {"output_router_logits": True},
    "scoring_func = sigmoid, which is another family's": {"scoring_func": "sigmoid"},
    "shared_expert_intermediate_size = 8": {"shared_expert_intermediate_size": 8},
    "shared_expert_intermediate_size left out": {"shared_expert_intermediate_size": REMOVED},
    "qkv_bias = false": {"qkv_bias": False},
}
"""Of the families with experts alone."""
FAMILIES = ("llama_untied", "qwen2_tied", "qwen3_untied", "qwen3moe_normalised", "qwen2moe_shared")


@dataclass(frozen=True)
class Outcome:
    """`gap`: the largest difference of logits. `refusal`: ours; `theirs`: transformers', with which nobody compares."""

    gap: float | None = None
    refusal: str = ""
    theirs: str = ""

    @property
    def is_right(self) -> bool:
        return bool(self.refusal) or (self.gap is not None and self.gap < TOLERANCE)


def outcomes(folder: Path, family: str) -> dict[str, Outcome]:
    """Of all CHANGES to a tiny model of `family`, over sequences longer than every original length in them."""
    groups = build_groups(ModelGrid.over(1, tp_size=1, pp_size=1, owner="student"))
    ids = torch.randint(3, 101, (2, 48), generator=torch.Generator().manual_seed(5))
    path = write_tiny_model(folder / family, family) / "config.json"
    config = json.loads(path.read_text())
    found = {}
    for name, change in changes_of(family).items():
        changed = {key: value for key, value in (config | change).items() if value is not REMOVED}
        if changed.get("tie_word_embeddings") == "other":
            changed["tie_word_embeddings"] = not config["tie_word_embeddings"]
        path.write_text(json.dumps(changed))
        found[name] = outcome(path.parent, groups, ids)
    return found


def changes_of(family: str) -> dict[str, dict[str, Any]]:
    return CHANGES | (EXPERT_CHANGES if "moe" in family else {})


def outcome(folder: Path, groups: Any, ids: torch.Tensor) -> Outcome:
    try:
        checkpoint = HfCheckpoint(folder)
        model = build_gpt(checkpoint.architecture, groups, padded_vocab_size=101, dtype=torch.float32)
        load_hf(model, checkpoint, groups)
    except MegatronTipError as error:
        return Outcome(refusal=str(error).partition("/config.json: ")[2] or str(error).partition(": ")[2])
    logits = megatron_logits(model, groups, ids)
    assert logits is not None
    try:
        expected = hf_logits(folder, ids)
    except Exception as error:
        return Outcome(theirs=f"{type(error).__name__}: {error}")
    return Outcome(gap=(logits - expected).abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_our_logits_are_those_of_transformers_or_there_are_none(family: str, tmp_path: Path) -> None:
    (found,) = run_workers(outcomes, 1, tmp_path, tmp_path, family, timeout_seconds=240)
    wrong = {name: one for name, one in found.items() if not one.is_right}
    assert not wrong
    compared = [name for name, one in found.items() if one.gap is not None]
    assert len(compared) > len(found) / 2, "most of them must be models that run"


def main() -> None:
    """Prints the table of all families."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        columns = {family: outcomes(Path(folder), family) for family in FAMILIES}
    for names, families in ((CHANGES, FAMILIES), (EXPERT_CHANGES, FAMILIES[-2:])):
        print(f"| config.json | {' | '.join(family.partition('_')[0] for family in families)} |")
        print("|---" * (1 + len(families)) + "|")
        for name in names:
            cells = [columns[family][name] for family in families]
            print(f"| {name} | {' | '.join('refused' if one.refusal else f'{one.gap:.0e}' for one in cells)} |")


if __name__ == "__main__":
    main()
