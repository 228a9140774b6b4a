"""`megatron-tip plan`: memory, traffic and time of a run on a cluster, simulated on this machine."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_tip.commands.outcome import errors_reported
from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError


@errors_reported()
def command(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The run, as for train; needs no weights.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    gpu: Annotated[str, typer.Option(help="h800, h100, h200, a100, b200, or FILE.toml that describes one.")] = "h800",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the trainer.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Workers per node.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print values instead of a table.")] = False,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Measure this CPU, write its description, and stop.")
    ] = None,
) -> None:
    """Runs a step of one rank of each kind in a simulated world, and prints memory, messages and time.

    Needs no GPU and no weights: the product's own code runs on tensors that have only a shape. Refuses what train
    refuses. The exit code is 1 if the run does not fit the GPU's memory.
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
    config, device = load_config(config_path, overrides or []), find_device(gpu)
    from megatron_tip.simulation.plan import make_plan  # imports Megatron
    from megatron_tip.simulation.report import as_text, as_values

    plan = make_plan(config, nodes * gpus_per_node, device, gpus_per_node=gpus_per_node)
    typer.echo(json.dumps(as_values(plan), indent=1) if as_json else as_text(plan))
    if not plan.fits:
        raise SystemExit(1)
