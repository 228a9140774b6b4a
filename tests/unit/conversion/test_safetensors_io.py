"""Hugging Face directories that are whole, and every way in which they are not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_tip.conversion.safetensors_io import INDEX_NAME, SINGLE_NAME, HfCheckpoint, write_safetensors
from megatron_tip.conversion.weight_map import hf_shapes
from megatron_tip.errors import OutputError, WeightsError
from megatron_tip.files import new_folder
from tests.helpers.disk import little_space
from tests.helpers.models import hf_logits, write_tiny_model

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "single", "qwen2_tied")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "sharded", "llama_untied", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_reads_parts_of_tensors_from_one_file_and_from_many(single: Path, sharded: Path) -> None:
    for folder in (single, sharded):
        checkpoint = HfCheckpoint(folder)
        tensors: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
        gate = tensors[GATE]
        assert torch.equal(checkpoint.read(GATE), gate)
        assert torch.equal(checkpoint.read_rows(GATE, 5, 9), gate[5:9])
        assert torch.equal(checkpoint.read_columns(GATE, 5, 9), gate[:, 5:9])
        padded = checkpoint.read_rows("model.embed_tokens.weight", 99, 104)
        assert torch.equal(padded[:2], tensors["model.embed_tokens.weight"][99:101])
        assert not padded[2:].any()
        assert not checkpoint.read_rows("model.embed_tokens.weight", 104, 108).any()
        assert checkpoint.dtype == torch.float32


def test_dropped_layers_are_not_there(single: Path) -> None:
    full, pruned = HfCheckpoint(single), HfCheckpoint(single, drop_layers=(0, 2))
    assert pruned.architecture.num_layers == 2
    assert pruned.config["num_hidden_layers"] == 2
    assert pruned.config["layer_types"] == ["full_attention"] * 2
    assert torch.equal(pruned.read(GATE.replace(".1.", ".0.")), full.read(GATE))
    assert torch.equal(pruned.read(GATE), full.read(GATE.replace(".1.", ".3.")))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere/config\.json: no such file"):
        HfCheckpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "\udcff"])
def test_broken_config(single: Path, text: str) -> None:
    (single / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match=r"config\.json"):
        HfCheckpoint(single)


def test_no_weights(single: Path) -> None:
    (single / SINGLE_NAME).unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors: no such file"):
        HfCheckpoint(single)


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_truncated_file(single: Path, size: int) -> None:
    path = single / SINGLE_NAME
    with path.open("r+b") as file:
        file.truncate(size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a complete safetensors file"):
        HfCheckpoint(single)


def test_missing_and_truncated_shards(sharded: Path) -> None:
    second = sorted(sharded.glob("*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=f"{second.name}: not a complete"):
        HfCheckpoint(sharded)
    second.unlink()
    with pytest.raises(WeightsError, match=f"{second.name}: no such file"):
        HfCheckpoint(sharded)


@pytest.mark.parametrize(
    "index,message",
    [({}, "weight_map"), ({"weight_map": {"a": 1}}, "weight_map"), ({"weight_map": {"a": "../b"}}, "same folder")],
)
def test_broken_index(sharded: Path, index: dict, message: str) -> None:
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message):
        HfCheckpoint(sharded)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[GATE]


def _transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE] = tensors[GATE].T.contiguous()


def _quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE] = tensors[GATE].to(torch.int8)


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(32)


@pytest.mark.parametrize(
    "change,message",
    [
        (_drop, f"expected a tensor {GATE}, found none"),
        (_transpose, rf"expected {GATE} of shape \(48, 32\).*got \(32, 48\)"),
        (_quantise, f"expected {GATE} .* in F32 or BF16 or F16, got .* I8"),
        (_add, r"also found model\.layers\.0\.self_attn\.o_proj\.bias"),
    ],
)
def test_other_tensors_than_the_model_has(single: Path, change: Callable, message: str) -> None:
    tensors = load_file(single / SINGLE_NAME)
    change(tensors)
    save_file(tensors, single / SINGLE_NAME)
    with pytest.raises(WeightsError, match=message):
        HfCheckpoint(single)


def test_tensors_that_old_checkpoints_have_besides(single: Path) -> None:
    tensors = load_file(single / SINGLE_NAME)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied: the embeddings count
    save_file(tensors, single / SINGLE_NAME)
    HfCheckpoint(single)


@pytest.mark.parametrize("max_file_bytes,num_files", [(10**9, 1), (30_000, 5), (1, 50)])
def test_what_is_written_is_what_transformers_reads(
    single: Path, tmp_path: Path, max_file_bytes: int, num_files: int
) -> None:
    (single / "tokenizer.json").write_text('{"a": "ü"}')
    (single / "modeling_custom.py").write_text("")
    checkpoint = HfCheckpoint(single)
    shapes = hf_shapes(checkpoint.architecture)
    with new_folder(tmp_path / "new") as folder:
        checkpoint.write_description(folder, torch.float32)
        stream = ((name, checkpoint.read(name)) for name in shapes)
        write_safetensors(folder, stream, shapes, torch.float32, max_file_bytes=max_file_bytes)
    written = HfCheckpoint(tmp_path / "new")
    for name in shapes:
        assert torch.equal(written.read(name), checkpoint.read(name)), name
    input_ids = torch.arange(10)[None]
    assert torch.equal(hf_logits(written.folder, input_ids), hf_logits(single, input_ids))
    assert len(list(written.folder.glob("*.safetensors"))) == num_files
    assert (written.folder / "tokenizer.json").read_bytes() == (single / "tokenizer.json").read_bytes()
    assert not (written.folder / "modeling_custom.py").exists()


def test_written_dtype_is_the_one_that_the_config_says(single: Path, tmp_path: Path) -> None:
    checkpoint = HfCheckpoint(single)
    shapes = hf_shapes(checkpoint.architecture)
    with new_folder(tmp_path / "new") as folder:
        checkpoint.write_description(folder, torch.bfloat16)
        write_safetensors(folder, ((name, checkpoint.read(name)) for name in shapes), shapes, torch.bfloat16)
    written = HfCheckpoint(tmp_path / "new")
    assert written.config["dtype"] == "bfloat16"
    assert written.dtype == torch.bfloat16
    assert torch.equal(written.read(GATE), checkpoint.read(GATE).bfloat16())


def test_full_disk_leaves_nothing(single: Path, tmp_path: Path) -> None:
    checkpoint = HfCheckpoint(single)
    shapes = hf_shapes(checkpoint.architecture)
    stream = ((name, checkpoint.read(name)) for name in shapes)
    with (
        pytest.raises(OutputError, match="new: cannot be written"),
        little_space(),
        new_folder(tmp_path / "new") as folder,
    ):
        write_safetensors(folder, stream, shapes, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["single"]


def test_a_single_file_counts_before_an_index(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As for transformers; also where the files that the index names are gone."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sharded.glob("*.safetensors"):
        tensors |= load_file(path)
    tensors[GATE] = torch.ones_like(tensors[GATE])
    save_file(tensors, sharded / SINGLE_NAME, metadata={"format": "pt"})
    assert torch.equal(HfCheckpoint(sharded).read(GATE), tensors[GATE])
    assert "the weights are those of model.safetensors" in caplog.text
    theirs = AutoModelForCausalLM.from_pretrained(sharded).state_dict()[GATE]
    assert torch.equal(theirs, tensors[GATE])
    for path in sharded.glob("model-*.safetensors"):
        path.unlink()
    assert torch.equal(HfCheckpoint(sharded).read(GATE), tensors[GATE])


def test_a_head_that_is_stored_beside_tied_embeddings(single: Path) -> None:
    tensors = load_file(single / SINGLE_NAME)
    embeddings = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embeddings.clone()}, single / SINGLE_NAME, metadata={"format": "pt"})
    assert HfCheckpoint(single).architecture.tied_embeddings
    other = embeddings.clone()
    other[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": other}, single / SINGLE_NAME, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"expected lm_head\.weight to be the word embeddings.*got another one"):
        HfCheckpoint(single)
