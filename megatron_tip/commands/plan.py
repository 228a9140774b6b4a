"""`megatron-tip plan`: memory, messages and time of a run on a cluster, simulated on this machine."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_tip.commands.outcome import errors_reported
from megatron_tip.commands.run_command import Overrides, configured_run
from megatron_tip.cpu.lean_imports import lean_imports
from megatron_tip.errors import ConfigError
from megatron_tip.parallel.environment import available_threads

if TYPE_CHECKING:
    from megatron_tip.simulation.narrowing import Site


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
    shares: Annotated[
        bool, typer.Option("--shares", help="Also plan other budgets and lengths; takes several times as long.")
    ] = False,
) -> None:
    """Runs a step of one rank of each kind in a simulated world, and prints memory, messages and time.

    Needs no GPU and no weights: the product's own code runs on tensors that have only a shape. Refuses what train
    refuses. The exit code is 1 if the run does not fit the GPU's memory; with --search, if no layout does.
    """
    if search and (html is not None or shares):
        raise ConfigError("--search: expected neither --html nor --shares; plan the layout that you choose with them")
    # The simulated tensors are the CPU's: on a machine with a GPU, Megatron would place them there.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # without it, Megatron warns that a GPU would be slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the batches are planned at the same time, in processes
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages: millions of tokens take many small
    configured_run(config_path, overrides)  # a wrong key is reported before torch loads
    with lean_imports():
        from megatron_tip.simulation import device, narrowing, page  # late: imports torch and Megatron
    given = overrides or []
    site = narrowing.Site(
        lambda more: configured_run(config_path, [*given, *more]),
        device.find_device(gpu),
        nodes,
        gpus_per_node,
        num_processes=available_threads(),
    )
    if html is not None:
        page.require_writable(html)
    fits = _search(site, given, as_json) if search else _plan(site, as_json=as_json, html=html, with_shares=shares)
    if not fits:
        raise SystemExit(1)


def _plan(site: "Site", *, as_json: bool, html: Path | None, with_shares: bool) -> bool:
    """Prints the plan, and writes its page. Returns whether the run fits."""
    from megatron_tip.simulation import page, plan, report
    from megatron_tip.simulation.shares import phase_shares

    hosts = plan.planned_hosts(site.config, site.nodes, site.gpus_per_node)
    found = plan.make_plan(site.config, hosts, site.device, num_processes=site.num_processes)
    shares = phase_shares(site, found, _say) if with_shares else []
    typer.echo(json.dumps(report.as_values(found, shares), indent=1) if as_json else report.as_text(found, shares))
    if html is not None:
        page.write_plan_page(found, html, shares)
        typer.echo(f"wrote {html}", err=True)
    return found.fits


def _search(site: "Site", given: Sequence[str], as_json: bool) -> bool:
    """Prints the best layouts, with the overrides that were `given`. Returns whether any fits."""
    from megatron_tip.simulation import search, search_report

    found = search.search_layouts(site, _say)
    if as_json:
        typer.echo(json.dumps(search_report.as_values(found, given), indent=1))
    else:
        gpus = f"{site.nodes} nodes of {site.gpus_per_node} {site.device.name}"
        typer.echo(search_report.as_text(found, given, gpus))
    return bool(found.best)


def _say(line: str) -> None:
    """Prints a line about the progress on stderr."""
    typer.echo(line, err=True)
