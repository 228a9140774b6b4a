"""What a path is that was given as a model's folder and is none: the refusal says so, and what to give instead."""

import difflib
import re
from contextlib import suppress
from pathlib import Path

from megatron_tip.conversion.known_models import named_after
from megatron_tip.errors import WeightsError
from megatron_tip.files import is_lfs_pointer

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = ("*.bin", "*.pt", "*.pth")
"""Patterns of weights that only unpickling reads, which may run code."""


def require_model_folder(folder: Path) -> None:
    """Raises WeightsError, with what to do instead, unless `folder` is a folder with a config.json of a whole model.

    Whether its content is right is checked by those who read it.
    """
    if not folder.exists():
        raise WeightsError(f"{folder}/config.json: no such file{_remedy_for_nothing(folder)}")
    if folder.is_file():
        raise WeightsError(f"expected a model's folder, got the file {folder}; {_remedy_for_file(folder)}")
    is_adapter = (folder / "adapter_config.json").exists() and not any(folder.glob("model*.safetensors"))
    if is_adapter:
        raise WeightsError(
            f"expected a whole model, got the adapter (LoRA) in {folder}; merge it into its base model first, with "
            "PEFT's merge_and_unload() and save_pretrained()"
        )
    if not (folder / "config.json").exists():
        raise WeightsError(f"{folder}/config.json: no such file; {_remedy_for_folder(folder)}")


def missing_weights(folder: Path) -> str:
    """Returns a remedy for a folder without weights in safetensors files."""
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        return (
            "its weights are pickles, which may run code when they are read; load the model with transformers and save "
            "it with save_pretrained(), which writes safetensors"
        )
    if any(folder.glob("*.gguf")):
        return "convert its GGUF file: python tools/gguf_to_hf.py FILE.gguf NEW_FOLDER"
    return "the model's weights are missing or not in safetensors format"


def require_no_pointer(path: Path) -> None:
    """Raises WeightsError if `path` is a Git LFS pointer in the place of a model's file."""
    if is_lfs_pointer(path):
        raise WeightsError(
            f"{path}: expected the file itself, got a Git LFS pointer; run `git lfs pull` in {path.parent}, or fetch "
            "the model with `hf download`"
        )


def _remedy_for_nothing(folder: Path) -> str:
    siblings: list[str] = []
    with suppress(OSError):
        siblings = [path.name for path in folder.parent.iterdir()]
    if close := difflib.get_close_matches(folder.name, siblings, n=1):
        return f"; did you mean {folder.parent / close[0]}?"
    if known := named_after(folder):
        owner = known.source.split("/")[1]
        local = f"models/{folder.name}" if str(folder) == f"{owner}/{folder.name}" else str(folder)
        return f"; a run fetches no models: `hf download {owner}/{folder.name} --local-dir {local}` does" + (
            "" if local == str(folder) else f"; then give {local}"
        )
    if _HUB_NAME.fullmatch(str(folder)) and not folder.parent.is_dir():
        return (
            "; if this is a name on the Hugging Face Hub: a run fetches no models; fetch it first, `hf download "
            f"{folder} --local-dir models/{folder.name}`, and give models/{folder.name}"
        )
    return ""


def _remedy_for_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"convert it: python tools/gguf_to_hf.py {path} NEW_FOLDER"
    return f"give the folder that holds it, with config.json and tokenizer: {path.parent}"


def _remedy_for_folder(folder: Path) -> str:
    if (folder / "summary.json").exists() and (folder / "hf").is_dir():
        return f"this is the folder of a run: give {folder / 'hf'}"
    snapshots = sorted(path.parent for path in folder.glob("snapshots/*/config.json"))
    if snapshots:
        return f"this is a folder of the Hub's cache: give {snapshots[-1]}"
    if any(folder.glob("*.distcp")) or (folder / ".metadata").exists():
        return "this is a Megatron checkpoint: convert it with tools/convert_megatron_to_hf.py"
    below = sorted(path.parent for path in folder.glob("*/config.json"))
    if below:
        return f"did you mean {below[0]}?"
    if any(folder.glob("*.gguf")) or any(any(folder.glob(pattern)) for pattern in _PICKLES):
        return missing_weights(folder)
    return "expected a model's folder with a config.json"
