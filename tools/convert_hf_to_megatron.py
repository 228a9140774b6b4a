"""Hugging Face directory -> Megatron checkpoint.

    python tools/convert_hf_to_megatron.py HF_FOLDER MEGATRON_FOLDER [--tp 2 --pp 2] [--drop-layer 20 --drop-layer 21]

The checkpoint can be read in any layout; --tp and --pp only divide the work and the memory among processes.
"""

from pathlib import Path
from typing import Annotated

import typer
from workers import Dtype, check_conversion, empty_model, run_in_workers


def main(
    source: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    target: Annotated[Path, typer.Argument(help="Folder to create.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: unchanged.")] = "auto",
    drop_layer: Annotated[list[int] | None, typer.Option(help="A layer to leave out, from 0; repeatable.")] = None,
) -> None:
    """Convert a Hugging Face directory into a Megatron checkpoint."""
    dropped = drop_layer or []
    run_in_workers(
        lambda: check_conversion(open_checkpoint(source, dropped), target, tp, pp),
        lambda: convert(source, target, tp, pp, dtype, dropped),
        tp * pp,
    )


def open_checkpoint(source: Path, drop_layers: list[int]):
    """Returns the directory's headers, checked."""
    from megatron_tip.conversion.safetensors_io import HfCheckpoint

    return HfCheckpoint(source, drop_layers)


def convert(source: Path, target: Path, tp_size: int, pp_size: int, dtype: Dtype, drop_layers: list[int]) -> None:
    """Converts one worker's part. Collective over the world."""
    from megatron_tip.conversion.bridge import load_hf
    from megatron_tip.conversion.megatron_checkpoint import save_megatron_checkpoint
    from megatron_tip.parallel.distributed import destroy_distributed

    checkpoint = open_checkpoint(source, drop_layers)
    model, groups = empty_model(checkpoint, tp_size, pp_size, dtype)
    load_hf(model, checkpoint, groups)
    save_megatron_checkpoint(model, checkpoint, groups, target)
    destroy_distributed()


if __name__ == "__main__":
    typer.run(main)
