"""`megatron-tip plan`: memory, messages and time of a run on a cluster, simulated on this machine."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_tip.commands.outcome import errors_reported
from megatron_tip.commands.run_command import Overrides, configured_run
from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.cpu.lean_imports import lean_imports
from megatron_tip.errors import ConfigError
from megatron_tip.observability.logs import hide_warnings_of_libraries

if TYPE_CHECKING:
    from megatron_tip.simulation.device import Device


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
    search: Annotated[
        bool, typer.Option("--search", help="Print the fastest layouts that fit, as overrides, instead of the plan.")
    ] = False,
) -> None:
    """Runs a step of one rank of each kind in a simulated world, and prints memory, messages and time.

    Needs no GPU and no weights: the product's own code runs on tensors that have only a shape. Refuses what train
    refuses. The exit code is 1 if the run does not fit the GPU's memory; with --search, if no layout does.
    """
    if search and html is not None:
        raise ConfigError("--html: expected no --search, which has no picture; plan the layout that you choose")
    # The simulated tensors are the CPU's: on a machine with a GPU, Megatron would place them there.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # without it, Megatron warns that a GPU would be slower
    config = configured_run(config_path, overrides)
    hide_warnings_of_libraries()
    with lean_imports():
        from megatron_tip.simulation import device, page, plan, report  # late: imports torch and Megatron
    chosen = device.find_device(gpu)
    if search:
        fits = _search(config_path, overrides or [], chosen, nodes, gpus_per_node, as_json=as_json)
        raise SystemExit(0 if fits else 1)
    if html is not None:
        page.require_writable(html)
    found = plan.make_plan(config, plan.planned_hosts(config, nodes, gpus_per_node), chosen)
    typer.echo(json.dumps(report.as_values(found), indent=1) if as_json else report.as_text(found))
    if html is not None:
        page.write_plan_page(found, html)
        typer.echo(f"wrote {html}", err=True)
    if not found.fits:
        raise SystemExit(1)


def _search(
    config_path: Path, overrides: list[str], device: "Device", nodes: int, gpus_per_node: int, *, as_json: bool
) -> bool:
    """Prints the best layouts, and the progress on stderr. Returns whether any fits."""
    from megatron_tip.simulation import search, search_report
    from megatron_tip.simulation.narrowing import Site

    def configure(more: Sequence[str]) -> Config:
        return load_config(config_path, [*overrides, *more])

    site = Site(configure, device, nodes, gpus_per_node)
    found = search.search_layouts(site, lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(search_report.as_values(found, overrides), indent=1))
    else:
        gpus = f"{nodes} x {gpus_per_node} {device.name}"
        typer.echo(search_report.as_text(found, overrides, gpus))
    return bool(found.best)
