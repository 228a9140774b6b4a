"""GGUF file -> Hugging Face directory, dequantised.

python tools/gguf_to_hf.py MODEL.gguf HF_FOLDER [--dtype bfloat16]
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_tip.errors import MegatronTipError


def main(
    source: Annotated[Path, typer.Argument(help="GGUF file.")],
    target: Annotated[Path, typer.Argument(help="Folder to create.")],
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Convert a GGUF file into a Hugging Face directory."""
    import torch

    from megatron_tip.conversion.gguf import convert_gguf

    try:
        convert_gguf(source, target, dtype=getattr(torch, dtype), overwrite=overwrite)
    except MegatronTipError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    typer.run(main)
