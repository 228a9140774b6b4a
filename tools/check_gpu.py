"""Everything that only a GPU can answer, in eight minutes and without a network.

    python tools/check_gpu.py --collect-wheels FOLDER                  # before, where there is a package index
    python tools/check_gpu.py --wheels FOLDER --out checks.jsonl       # on the machine with the GPU
    python tools/check_gpu.py --device cpu                             # the same at small sizes, over gloo

Each check runs in a process of its own with its own time limit, the most telling first; one JSON line each, as it ends,
to standard output and --out. A table follows at the end. docs/gpu_check.md lists the checks.

Exit code 0: every check that shows something to be right has passed. 1: one has not, or was not run for lack of time.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.gpu_checks import wheels
from tools.gpu_checks.checks import CHECKS
from tools.gpu_checks.run import Outcome, run_checks
from tools.gpu_checks.summary import table_of


def main(
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="cpu: small sizes, whose figures mean little.")
    ] = "cuda",
    seconds: Annotated[float, typer.Option(min=1, help="Limit of all checks together.")] = 480.0,
    out: Annotated[Path | None, typer.Option(help="Write the JSON lines to this file too.")] = None,
    wheels_folder: Annotated[
        Path | None, typer.Option("--wheels", help="Wheels to install into a temporary folder first.")
    ] = None,
    collect: Annotated[
        Path | None, typer.Option("--collect-wheels", help="Fetch the wheels into this folder, and do nothing else.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only checks with this in their name; repeatable.")] = None,
    lists: Annotated[bool, typer.Option("--list", help="Name the checks, and do nothing else.")] = False,
) -> None:
    """Check on one GPU what a CPU cannot: kernels, NCCL, speed, memory."""
    start = time.monotonic()
    checks = [check for check in CHECKS if any(part in check.name for part in only or [""])]
    if collect is not None:
        typer.echo("\n".join(wheels.collect(collect)))
    elif lists:
        typer.echo("\n".join(f"{check.name:<14} {check.seconds:>4.0f} s  {check.what}" for check in checks))
    else:
        with tempfile.TemporaryDirectory(prefix="check_gpu_") as name:
            if wheels_folder is not None:
                wheels.install(wheels_folder, Path(name))
            wheels.describe_package(Path(name))
            left = seconds - (time.monotonic() - start)
            outcomes = [told(outcome, out) for outcome in run_checks(checks, device, left, Path(name))]
        Console(width=150).print(table_of(outcomes))
        raise typer.Exit(any(outcome.is_bad for outcome in outcomes))


def told(outcome: Outcome, out: Path | None) -> Outcome:
    """Returns `outcome`, once its JSON line is printed and written."""
    line = json.dumps(outcome.record())
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")
    return outcome


if __name__ == "__main__":
    typer.run(main)
