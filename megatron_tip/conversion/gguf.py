"""Conversion of a GGUF file, which holds quantised weights and a tokenizer, into a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils.import_utils import is_gguf_available

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.safetensors_io import write_safetensors
from megatron_tip.conversion.weight_map import hf_shapes
from megatron_tip.errors import OptionalDependencyError, WeightsError
from megatron_tip.files import new_folder, write_json


def convert_gguf(source: Path, target: Path, *, dtype: torch.dtype = torch.float32, overwrite: bool = False) -> None:
    """Writes the model and the tokenizer in the file `source` as a Hugging Face directory `target`, dequantised.

    transformers reads the whole file into memory, in float32.

    Raises:
        OptionalDependencyError: the package gguf is not installed.
        WeightsError: `source` is missing, or holds no model that we support, or one with experts.
        OutputError: `target` cannot be written, or exists and `overwrite` is not set.
    """
    config, state, tokenizer = _read(source)
    architecture = ModelArchitecture.from_config(config, str(source))
    if architecture.experts is not None:
        raise WeightsError(
            f"{source}: expected a model without experts, got {architecture.family}; use its safetensors"
        )
    shapes = hf_shapes(architecture)
    with new_folder(target, overwrite=overwrite) as folder:
        write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        tokenizer.save_pretrained(folder)
        write_safetensors(folder, ((name, state[name]) for name in shapes), shapes, dtype)


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor], PreTrainedTokenizerBase]:
    """Returns the config.json's content, the weights and the tokenizer."""
    if not is_gguf_available():
        raise OptionalDependencyError(
            "reading GGUF: the package gguf is not installed; install megatron_tip[quickstart]"
        )
    if not source.is_file():
        raise WeightsError(f"{source}: no such file; expected a GGUF file")
    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        # AutoModelForCausalLM.from_pretrained calls it too, but first demands a package that it then does not use.
        state = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{source}: transformers cannot read it: {error}") from error
    content = json.loads(config.to_json_string()) | {"architectures": [type(model).__name__]}
    return {key: value for key, value in content.items() if not key.startswith("_")}, state, tokenizer
