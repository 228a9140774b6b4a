"""Hugging Face directories, Megatron-Core models and Megatron checkpoints, each from the others."""

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.bridge import export_hf, load_hf, load_output_head, save_hf
from megatron_tip.conversion.megatron_checkpoint import (
    MegatronCheckpoint,
    load_megatron_checkpoint,
    save_megatron_checkpoint,
)
from megatron_tip.conversion.model_folder import ModelFolder
from megatron_tip.conversion.safetensors_io import HfCheckpoint

__all__ = [
    "HfCheckpoint",
    "MegatronCheckpoint",
    "ModelArchitecture",
    "ModelFolder",
    "export_hf",
    "load_hf",
    "load_megatron_checkpoint",
    "load_output_head",
    "save_hf",
    "save_megatron_checkpoint",
]
