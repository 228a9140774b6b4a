"""`megatron-tip plan`: memory, messages and time of a run on a cluster, simulated on this machine."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_tip.commands.outcome import errors_reported
from megatron_tip.commands.run_command import Overrides, configured_run
from megatron_tip.cpu.lean_imports import lean_imports
from megatron_tip.parallel.environment import available_threads


@errors_reported()
def command(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="The run, as for train; needs no weights.")
    ],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="h800, h100, h200, a100, b200, or FILE.toml that describes one.")] = "h800",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the trainer.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print values instead of a table.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write a picture of the step.")] = None,
) -> None:
    """Runs a step of one rank of each kind in a simulated world, and prints memory, messages and time.

    Needs no GPU and no weights: the product's own code runs on tensors that have only a shape. Refuses what train
    refuses. The exit code is 1 if the run does not fit the GPU's memory.
    """
    # The simulated tensors are the CPU's: on a machine with a GPU, Megatron would place them there.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # without it, Megatron warns that a GPU would be slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the batches are planned at the same time, in processes
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages: millions of tokens take many small
    config = configured_run(config_path, overrides)
    with lean_imports():
        from megatron_tip.simulation import device, page, plan, report  # late: imports torch and Megatron
    chosen = device.find_device(gpu)
    if html is not None:
        page.require_writable(html)
    hosts = plan.planned_hosts(config, nodes, gpus_per_node)
    found = plan.make_plan(config, hosts, chosen, num_processes=available_threads())
    typer.echo(json.dumps(report.as_values(found), indent=1) if as_json else report.as_text(found))
    if html is not None:
        page.write_plan_page(found, html)
        typer.echo(f"wrote {html}", err=True)
    if not found.fits:
        raise SystemExit(1)
