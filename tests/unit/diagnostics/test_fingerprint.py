"""Models and tokenizers are told apart, and known again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.diagnostics.fingerprint import model_fingerprint, tokenizer_fingerprint
from tests.helpers.tiny import make_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "model", seed=1, num_layers=2)


def test_a_model_is_known_again_elsewhere(folder: Path, tmp_path: Path):
    again = make_llama(tmp_path / "again", seed=1, num_layers=2)
    assert model_fingerprint(folder) == model_fingerprint(again)
    assert model_fingerprint(folder) != model_fingerprint(make_llama(tmp_path / "other", seed=2, num_layers=2))


def test_dropped_layers_make_another_model(folder: Path):
    whole, pruned = (model_fingerprint(folder, HfCheckpoint(folder, dropped)) for dropped in ((), (1,)))
    assert whole != pruned


def test_one_weight_makes_another_model(folder: Path):
    before = model_fingerprint(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] + torch.tensor(1.0)
    save_file(weights, path, metadata={"format": "pt"})
    assert model_fingerprint(folder) != before


def test_a_token_more_makes_another_tokenizer(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = tokenizer_fingerprint(tokenizer)
    assert before == tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder))
    tokenizer.add_tokens(["<|more|>"])
    assert tokenizer_fingerprint(tokenizer) != before
