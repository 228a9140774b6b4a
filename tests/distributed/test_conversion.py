"""Models built from Hugging Face directories, sharded, against transformers; and the way back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_tip.conversion.bridge import export_hf, load_hf
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.models.gpt import build_gpt, prepare_megatron
from megatron_tip.parallel.groups import ModelGrid, build_groups
from tests.helpers.distributed import run_workers
from tests.helpers.models import VARIANTS, hf_logits, megatron_logits, write_tiny_model

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
INPUT_IDS = torch.randint(0, 101, (2, 32), generator=torch.Generator().manual_seed(1))
PADDED_VOCAB_SIZE = 104


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny_model(root / name, name) for name in VARIANTS}


@pytest.fixture(scope="module")
def expected_logits(tiny_models: dict[str, Path]) -> dict[str, Tensor]:
    return {name: hf_logits(folder, INPUT_IDS) for name, folder in tiny_models.items()}


@pytest.mark.parametrize("tp_size,pp_size", LAYOUTS)
def test_logits_and_round_trip(
    tiny_models: dict[str, Path], expected_logits: dict[str, Tensor], tmp_path: Path, tp_size: int, pp_size: int
) -> None:
    results = run_workers(_logits_and_export, tp_size * pp_size, tmp_path, tiny_models, tp_size, pp_size)
    for name, folder in tiny_models.items():
        logits = [result[name][0] for result in results if result[name][0] is not None]
        assert len(logits) == tp_size
        for rank_logits in logits:
            torch.testing.assert_close(rank_logits[..., :101], expected_logits[name], rtol=0, atol=1e-4)
            assert not rank_logits[..., 101:].any(), "padding rows of the head are not zero"
        original = load_file(folder / "model.safetensors")
        assert dict.fromkeys(results[0][name][1]) == dict.fromkeys(original), name
        for key, tensor in results[0][name][1].items():
            assert torch.equal(tensor, original[key]), f"{name}: {key}"
        assert all(result[name][1] == {} for result in results[1:])


def _logits_and_export(folders: dict[str, Path], tp_size: int, pp_size: int) -> dict[str, tuple]:
    torch.set_num_threads(1)
    prepare_megatron()
    groups = build_groups(ModelGrid.over(tp_size * pp_size, tp_size=tp_size, pp_size=pp_size, owner="student"))
    results = {}
    for name, folder in folders.items():
        checkpoint = HfCheckpoint(folder)
        model = build_gpt(
            checkpoint.architecture,
            groups,
            padded_vocab_size=PADDED_VOCAB_SIZE,
            dtype=torch.float32,
            sequence_parallel=tp_size > 1 and name.endswith("untied"),
        )
        load_hf(model, checkpoint, groups)
        logits = megatron_logits(model, groups, INPUT_IDS)
        exported = {key: tensor.clone() for key, tensor in export_hf(model, checkpoint.architecture, groups)}
        results[name] = (logits, exported)
    return results
