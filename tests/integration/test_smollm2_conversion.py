"""Real weights: SmolLM2-135M-Instruct against transformers in every layout that its 9 heads permit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tip.conversion.bridge import export_hf, load_hf
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.models.gpt import build_gpt, prepare_megatron
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import build_groups
from megatron_tip.vocab_parallel import padded_vocab_size
from tests.helpers.distributed import run_workers
from tests.helpers.models import hf_logits, megatron_logits, smollm2_folder

LAYOUTS = [(1, 1), (3, 1), (1, 2), (3, 2)]
TEXT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital of France is"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2_folder()


def test_the_weights_are_those_of_a_language_model(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    input_ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert tokenizer.decode(input_ids[0]) == TEXT
    continued = model.generate(input_ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(continued[0, input_ids.shape[1] :]) == " Paris."


def test_parity_and_round_trip_of_every_layout(folder: Path, tmp_path: Path) -> None:
    input_ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    exact = hf_logits(folder, input_ids, torch.float64)
    # Logits reach 36 here. float32 alone moves them by about 1e-4, and how far depends on the processor's products: so
    # much do transformers' own move, and three times as much is permitted.
    permitted = 3 * float((hf_logits(folder, input_ids) - exact).abs().max())
    assert permitted < 1e-3
    run_workers(_check_every_layout, 6, tmp_path, folder, input_ids, exact, permitted, timeout_seconds=280)


def _check_every_layout(folder: Path, input_ids: Tensor, exact: Tensor, permitted: float) -> None:
    prepare_megatron()
    checkpoint = HfCheckpoint(folder)
    architecture = checkpoint.architecture
    for tp_size, pp_size in LAYOUTS:
        groups = build_groups(ModelGrid.over(6, tp_size=tp_size, pp_size=pp_size, owner="student"))
        if groups.dp_rank != 0:
            continue
        padded = padded_vocab_size(architecture.vocab_size, tp_size, multiple_of=128)
        model = build_gpt(architecture, groups, padded_vocab_size=padded, dtype=torch.float32)
        load_hf(model, checkpoint, groups)
        logits = megatron_logits(model, groups, input_ids)
        if logits is not None:
            torch.testing.assert_close(logits[..., : architecture.vocab_size].double(), exact, rtol=0, atol=permitted)
        names = 0
        for name, tensor in export_hf(model, architecture, groups):
            assert torch.equal(tensor, checkpoint.read(name)), name
            names += 1
        assert names == (272 if groups.rank == 0 else 0)
