"""Megatron checkpoint -> Hugging Face directory for transformers and SGLang.

    python tools/convert_megatron_to_hf.py MEGATRON_FOLDER HF_FOLDER [--tp 2 --pp 2] [--dtype bfloat16]

Reads a checkpoint of any layout; --tp and --pp only divide the work and the memory among processes.
"""

from pathlib import Path
from typing import Annotated

import typer
from workers import Dtype, check_conversion, empty_model, run_in_workers


def main(
    source: Annotated[Path, typer.Argument(help="Folder that a run or convert_hf_to_megatron.py wrote.")],
    target: Annotated[Path, typer.Argument(help="Folder to create.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: unchanged.")] = "auto",
) -> None:
    """Convert a Megatron checkpoint into a Hugging Face directory."""
    run_in_workers(
        lambda: check_conversion(open_folder(source), target, tp, pp),
        lambda: convert(source, target, tp, pp, dtype),
        tp * pp,
    )


def open_folder(source: Path):
    """Returns the checkpoint's description."""
    from megatron_tip.conversion.model_folder import ModelFolder

    return ModelFolder(source)


def convert(source: Path, target: Path, tp_size: int, pp_size: int, dtype: Dtype) -> None:
    """Converts one worker's part. Collective over the world."""
    from megatron_tip.conversion.bridge import save_hf
    from megatron_tip.conversion.megatron_checkpoint import MegatronCheckpoint, load_megatron_checkpoint
    from megatron_tip.parallel.distributed import destroy_distributed

    checkpoint = MegatronCheckpoint(source)
    model, groups = empty_model(checkpoint, tp_size, pp_size, dtype)
    load_megatron_checkpoint(model, checkpoint, groups)
    save_hf(model, checkpoint, groups, target)
    destroy_distributed()


if __name__ == "__main__":
    typer.run(main)
