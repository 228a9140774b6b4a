"""What a model's folder says about the model, and what an export takes from it."""

import json
from pathlib import Path

import pytest
import torch

from megatron_tip.conversion.model_folder import ModelFolder, read_json
from megatron_tip.errors import WeightsError
from tests.helpers.models import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", "llama_untied")


def test_an_export_takes_templates_and_passes_over_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_backup").mkdir()
    (folder / "tokenizer_backup" / "tokenizer.json").write_text("old")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    target = tmp_path / "export"
    target.mkdir()
    ModelFolder(folder).write_description(target, torch.bfloat16)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "R"
    assert sorted(path.name for path in target.iterdir()) == sorted(
        ["additional_chat_templates", "config.json", "generation_config.json", "tokenizer.json"]
    )


def test_a_file_that_an_export_could_not_take_is_named_when_the_folder_is_opened(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to(folder / "tokenizer.json")  # a loop: the user may be root
    (folder / "vocab.json").symlink_to("gone")
    assert ModelFolder(folder).describing_files() == [folder / "generation_config.json"]


@pytest.mark.parametrize(
    "content,reason",
    [("[" * 200_000, "cannot be read as JSON"), ("[1]", "expected a JSON object, got list"), ("{", "cannot be read")],
)
def test_json_that_is_no_object(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(WeightsError, match=f"config.json: {reason}"):
        read_json(path)
