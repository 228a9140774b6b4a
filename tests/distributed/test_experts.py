"""Models with experts, against transformers, in every layout of the experts; and the ways back.

One world of four ranks runs every layout. All replicas compute the same sequences, because they may share experts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_tip.conversion.bridge import export_hf, load_hf, load_output_head, local_parameters, save_hf
from megatron_tip.conversion.megatron_checkpoint import (
    MegatronCheckpoint,
    load_megatron_checkpoint,
    save_megatron_checkpoint,
)
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.models.gpt import HiddenStatesModel, build_gpt, prepare_megatron
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import ModelGroups, build_groups
from tests.helpers.distributed import run_workers
from tests.helpers.models import EXPERT_VARIANTS, hf_logits, megatron_logits, write_tiny_model

LAYOUTS = [
    {"tp_size": 1, "pp_size": 1},
    {"tp_size": 1, "pp_size": 1, "ep_size": 2},
    {"tp_size": 1, "pp_size": 1, "ep_size": 4},
    {"tp_size": 2, "pp_size": 1, "ep_size": 2},
    {"tp_size": 2, "pp_size": 1, "ep_size": 1},
    {"tp_size": 2, "pp_size": 1, "ep_size": 1, "expert_tp_size": 1},
    {"tp_size": 2, "pp_size": 1, "ep_size": 4, "expert_tp_size": 1},
    {"tp_size": 1, "pp_size": 2, "ep_size": 2},
    {"tp_size": 2, "pp_size": 2, "ep_size": 2, "expert_tp_size": 1},
]
INPUT_IDS = torch.randint(0, 101, (2, 32), generator=torch.Generator().manual_seed(1))
VOCAB_SIZE, PADDED_VOCAB_SIZE = 101, 104


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny_model(root / name, name) for name in EXPERT_VARIANTS}


def test_logits_and_export_of_every_layout(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = {name: hf_logits(folder, INPUT_IDS) for name, folder in folders.items()}
    run_workers(_check_every_layout, 4, tmp_path, folders, expected, timeout_seconds=480)


def _check_every_layout(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    prepare_megatron()
    for layout in LAYOUTS:
        groups = _groups(**layout)
        for name, folder in folders.items():
            checkpoint = HfCheckpoint(folder)
            model = _build(checkpoint, groups)
            load_hf(model, checkpoint, groups)
            _check_logits(megatron_logits(model, groups, INPUT_IDS), expected[name], groups)
            _check_marks(model, checkpoint, groups)
            _check_export(model, checkpoint, groups)
            teacher = _build(checkpoint, groups, trainable=False)
            load_hf(teacher, checkpoint, groups)
            head = load_output_head(
                checkpoint,
                tp_rank=groups.tp_rank,
                tp_size=groups.grid.tp_size,
                padded_vocab_size=PADDED_VOCAB_SIZE,
                dtype=torch.float32,
            )
            _check_logits(megatron_logits(teacher, groups, INPUT_IDS, head), expected[name], groups)


def _check_logits(logits: Tensor | None, expected: Tensor, groups: ModelGroups) -> None:
    assert (logits is not None) == groups.is_last_stage
    if logits is not None:
        torch.testing.assert_close(logits[..., :VOCAB_SIZE], expected, rtol=0, atol=1e-4)


def _check_marks(model: HiddenStatesModel, checkpoint: HfCheckpoint, groups: ModelGroups) -> None:
    """What Megatron's gradient norm, its data-parallel reduction and sequence parallelism go by."""
    for name, parameter, weight in local_parameters(model, checkpoint.architecture, groups):
        assert getattr(parameter, "tensor_model_parallel", False) == (weight.partition_dim is not None), name
        if weight.partition_dim is not None:
            assert parameter.partition_dim == weight.partition_dim, name
        elif model.config.sequence_parallel:
            assert parameter.sequence_parallel, name
        assert getattr(parameter, "allreduce", True) == (weight.expert is None), name


def _check_export(model: HiddenStatesModel, checkpoint: HfCheckpoint, groups: ModelGroups) -> None:
    weights = export_hf(model, checkpoint.architecture, groups) if groups.holds_first_copy else ()
    exported = {name: tensor.clone() for name, tensor in weights}
    everywhere = export_hf(model, checkpoint.architecture, groups, everywhere=True)
    on_this_rank = {name: tensor.clone() for name, tensor in everywhere}
    original = load_file(checkpoint.folder / "model.safetensors")
    assert exported.keys() == (original.keys() if groups.rank == 0 else set())
    assert on_this_rank.keys() == original.keys()
    for name, tensor in [*exported.items(), *on_this_rank.items()]:
        assert torch.equal(original[name], tensor), name


def test_folders_and_checkpoints_hold_every_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    """Saved by the layout with all kinds of ranks, and read by every other."""
    run_workers(_check_saved, 4, tmp_path, folders, tmp_path, timeout_seconds=480)
    for name, folder in folders.items():
        original, written = (load_file(path / "model.safetensors") for path in (folder, tmp_path / name / "hf"))
        assert written.keys() == original.keys()
        assert all(torch.equal(written[key], tensor) for key, tensor in original.items())


def _check_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    prepare_megatron()
    every = [_groups(**layout) for layout in LAYOUTS]
    for name, folder in folders.items():
        checkpoint, target = HfCheckpoint(folder), tmp_path / name
        model = _build(checkpoint, every[-1])
        load_hf(model, checkpoint, every[-1])
        save_hf(model, checkpoint, every[-1], target / "hf")
        save_megatron_checkpoint(model, checkpoint, every[-1], target / "megatron")
        for groups in every:
            expected, loaded = (_build(checkpoint, groups) for _ in range(2))
            load_hf(expected, checkpoint, groups)
            for parameter in loaded.parameters():
                torch.nn.init.constant_(parameter, torch.nan)
            load_megatron_checkpoint(loaded, MegatronCheckpoint(target / "megatron"), groups)
            for (key, want), got in zip(expected.named_parameters(), loaded.parameters(), strict=True):
                assert torch.equal(got, want), (key, groups.grid)


def _groups(**layout: int) -> ModelGroups:
    return build_groups(ModelGrid.over(4, owner="student", **layout))


def _build(checkpoint: HfCheckpoint, groups: ModelGroups, **options: Any) -> HiddenStatesModel:
    arguments = {
        "padded_vocab_size": PADDED_VOCAB_SIZE,
        "dtype": torch.float32,
        "sequence_parallel": options.get("trainable", True),
        **options,
    }
    return build_gpt(checkpoint.architecture, groups, **arguments)
