"""What was given in the place of a model's folder is named, with what to give instead."""

from pathlib import Path

import pytest

from megatron_tip.conversion.not_a_model import require_model_folder
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.errors import WeightsError
from tests.helpers.models import write_tiny_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n"


@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "model", "llama_untied")


def write(folder, *names, text="{}"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "files,expected_text",
    [
        (["adapter_config.json", "adapter_model.safetensors"], "got the adapter (LoRA) in {folder}; merge it"),
        (["adapter_config.json", "config.json"], "got the adapter (LoRA)"),
        (["summary.json", "hf/config.json"], "this is the folder of a run: give {folder}/hf"),
        (["snapshots/abc/config.json"], "a folder of the Hub's cache: give {folder}/snapshots/abc"),
        ([".metadata", "__0_0.distcp"], "a Megatron checkpoint: convert it with tools/convert_megatron_to_hf.py"),
        (["student/config.json"], "did you mean {folder}/student?"),
        (["a.gguf"], "convert its GGUF file: python tools/gguf_to_hf.py"),
        (["pytorch_model.bin"], "its weights are pickles"),
        (["notes.txt"], "expected a model's folder with a config.json"),
    ],
)
def test_a_folder_of_something_else_is_named(tmp_path, files, expected_text):
    folder = write(tmp_path / "given", *files)
    with pytest.raises(WeightsError) as caught:
        require_model_folder(folder)
    assert expected_text.format(folder=folder) in str(caught.value)


@pytest.mark.parametrize(
    "name,expected_text",
    [
        ("model.safetensors", "give the folder that holds it, with config.json and tokenizer: {folder}"),
        ("model.gguf", "convert it: python tools/gguf_to_hf.py {folder}/model.gguf NEW_FOLDER"),
    ],
)
def test_a_file_in_the_place_of_its_folder_is_named(tmp_path, name, expected_text):
    folder = write(tmp_path / "given", name)
    with pytest.raises(WeightsError) as caught:
        require_model_folder(folder / name)
    assert expected_text.format(folder=folder) in str(caught.value)


def test_a_misspelt_folder_is_answered_with_its_neighbour(tmp_path):
    write(tmp_path, "Qwen3-4B/config.json")
    with pytest.raises(WeightsError, match=r"did you mean .*/Qwen3-4B\?"):
        require_model_folder(tmp_path / "Qwen3-4b")


def test_a_name_of_the_hub_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, expected_text in (
        ("Qwen/Qwen3-4B", "`hf download Qwen/Qwen3-4B --local-dir models/Qwen3-4B` does; then give models/Qwen3-4B"),
        ("models/Qwen3-4B-Base", "`hf download Qwen/Qwen3-4B-Base --local-dir models/Qwen3-4B-Base` does"),
        ("acme/Tiny", "fetch it first, `hf download acme/Tiny --local-dir models/Tiny`, and give models/Tiny"),
    ):
        with pytest.raises(WeightsError) as caught:
            require_model_folder(Path(given))
        assert str(caught.value).endswith(expected_text)


def test_a_whole_model_beside_an_adapter_is_a_model(model):
    write(model, "adapter_config.json")
    HfCheckpoint(model)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(model, name):
    (model / name).write_text(POINTER)
    with pytest.raises(WeightsError, match="got a Git LFS pointer; run `git lfs pull`"):
        HfCheckpoint(model)


def test_pickled_weights_are_not_read(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no such file; its weights are pickles"):
        HfCheckpoint(model)
