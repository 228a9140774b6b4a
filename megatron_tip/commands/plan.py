"""`megatron-tip plan`: memory, traffic and time of a run on a cluster, simulated on this machine."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_tip.commands.outcome import errors_reported
from megatron_tip.commands.run_command import Overrides, configured_run
from megatron_tip.config import Config
from megatron_tip.errors import ConfigError

if TYPE_CHECKING:
    from megatron_tip.placement.hosts import Hosts
    from megatron_tip.simulation.device import Device


@errors_reported()
def command(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The run, as for train; needs no weights.")
    ] = None,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="h800, h100, h200, a100, b200, or FILE.toml that describes one.")] = "h800",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the trainer.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node; for a CPU, workers.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print values instead of a table.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write a picture of the step.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Find the fastest layouts that fit; takes minutes. Says how far it is.")
    ] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="What grows with the run, from 8 to 1,024 ranks.")] = False,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Measure this CPU, write its description, and stop.")
    ] = None,
) -> None:
    """Runs a step of one rank of each kind in a simulated world, and prints memory, messages and time.

    Needs no GPU and no weights: the product's own code runs on tensors that have only a shape. Refuses what train
    refuses. The exit code is 1 if the run does not fit the GPU's memory, or a search finds nothing that does.
    """
    # The simulated tensors are the CPU's: on a machine with a GPU, Megatron would place them there.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_tip.simulation.device import calibrate as measure  # late: imports torch
    from megatron_tip.simulation.device import find_device

    if calibrate is not None:
        device = measure(calibrate)
        typer.echo(f"{calibrate}: {device.tflops * 1e3:.0f} GFLOP/s, {device.memory_tb_per_s * 1e3:.1f} GB/s")
        return
    if config_path is None:
        raise ConfigError("CONFIG.toml: expected a configuration, or --calibrate")
    if search + scaling + (html is not None) > 1:
        raise ConfigError("plan: expected at most one of --search, --scaling and --html")
    config, device = configured_run(config_path, overrides), find_device(gpu)
    from megatron_tip.simulation.plan import make_plan, planned_hosts  # imports Megatron
    from megatron_tip.simulation.report import as_text, as_values

    if scaling:
        _scale(config, device, gpus_per_node=gpus_per_node)
        return
    hosts = planned_hosts(config, nodes, gpus_per_node, device)
    if search:
        _search(config, hosts, device)
        return
    plan = make_plan(config, hosts, device)
    typer.echo(json.dumps(as_values(plan), indent=1) if as_json else as_text(plan))
    if html is not None:
        from megatron_tip.simulation.page import write_plan_page

        write_plan_page(plan, html)
        typer.echo(f"wrote {html}", err=True)
    if not plan.fits:
        raise SystemExit(1)


def _search(config: Config, hosts: "Hosts", device: "Device") -> None:
    """Prints the best layouts; what is being tried goes to standard error."""
    from megatron_tip.simulation.report import search_lines
    from megatron_tip.simulation.search import search_layouts

    found = search_layouts(config, hosts, device, say=lambda text: typer.echo(text, err=True))
    typer.echo("\n".join(search_lines(found)))
    if not found.best:
        raise SystemExit(1)


def _scale(config: Config, device: "Device", *, gpus_per_node: int) -> None:
    """Prints what grows with the number of ranks."""
    from megatron_tip.simulation.scaling import scaling_lines, scaling_rows

    typer.echo("\n".join(scaling_lines(scaling_rows(config, device, gpus_per_node=gpus_per_node))))
