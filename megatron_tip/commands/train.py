"""`megatron-tip train`: starts a run's workers, joins them, or only checks the run. torch is imported late."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_tip.commands.outcome import end_as, errors_reported
from megatron_tip.commands.run_command import Overrides, RunCommand, configured_run
from megatron_tip.config import Config
from megatron_tip.config.io import dump_config
from megatron_tip.config.reference import reference
from megatron_tip.cpu.lean_imports import lean_imports
from megatron_tip.errors import ConfigError
from megatron_tip.observability.logs import configure_logging
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.parallel.environment import is_restarted, is_worker
from megatron_tip.parallel.launch import run_worker, start_workers
from megatron_tip.placement.hosts import Hosts, hosts_elsewhere
from megatron_tip.placement.table import table_of
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.same_run import check_same_run

if TYPE_CHECKING:
    from megatron_tip.planning.dry_run import DryRun
    from megatron_tip.planning.plan import RunPlan


class TrainCommand(RunCommand):
    """A command whose help ends with the reference of the configuration."""

    def format_epilog(self, ctx, formatter) -> None:
        formatter.write("\n" + reference())


@errors_reported()
def command(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The run; its keys are listed below.")],
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Workers to start on this machine. Default: one per GPU; without GPUs, the fewest that hold both "
            "models. Ignored if torchrun or srun started the workers.",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Remove the unfinished run in run.folder and start over, instead of continuing it. Ignored when SLURM "
            "or torchrun restarts the same job.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the resolved configuration, stop.")] = False,
    world_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --dry-run: check for this many GPUs elsewhere; needs neither weights nor prompts."
        ),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="With --world-size: of each node; 0: no GPUs.")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="With --world-size: GiB of each of those GPUs.")] = 80.0,
) -> None:
    """Distils a teacher into a student.

    Starts the workers on this machine, unless torchrun or srun already did. Continues an unfinished run in run.folder
    from its newest checkpoint.

    Exit codes: 0 the run is finished; 2 the input is invalid; 128 + n signal n ended the command; 75 a worker received
    a stop signal and saved (after a second signal: 128 + n, nothing saved); 1 any other error. Whatever the code, the
    same command continues the run from its newest checkpoint.
    """
    if world_size and not dry_run:
        raise ConfigError(
            f"--world-size: expected --dry-run beside it, got --world-size {world_size} alone; how many workers a run "
            "has is up to --nproc, torchrun or srun"
        )
    config = configured_run(config_path, overrides)
    if not is_worker(os.environ):
        typer.echo(
            f"{'checking' if dry_run else 'starting'} {config_path}: {config.model.path.name} learns from "
            f"{config.teacher.path.name}, into {config.run.folder}",
            err=True,
        )
    if is_worker(os.environ) and not dry_run:
        _join(config, fresh=fresh)
    elif dry_run and world_size:
        check_elsewhere(config, hosts_elsewhere(world_size, gpus_per_node), gpu_memory)
        typer.echo(dump_config(config), nl=False)
        memory = f", with {gpu_memory:g} GiB per GPU" if gpus_per_node else ""
        typer.echo(f"ok: this configuration can run on {world_size} workers{memory}", err=True)
    else:
        num_workers, plan = _check(config, nproc, fresh=fresh, reads_prompts=dry_run)
        if dry_run:
            typer.echo("\n".join([*_described(config, plan), *table_of(plan.placement)]), err=True)
            typer.echo(dump_config(config), nl=False)
            typer.echo(f"ok: this configuration can run here, on {num_workers} workers", err=True)
        else:
            _start(["train", str(config_path), *(overrides or []), *["--fresh"] * fresh], config, num_workers)


def check_elsewhere(config: Config, hosts: Hosts, gpu_memory_gib: float) -> "DryRun":
    """Checks a run on other machines and prints the report to standard error.

    Raises:
        ConfigError: as `dry_run`, and if the memory does not suffice, after the report.
    """
    from megatron_tip.planning.dry_run import dry_run  # imports torch and transformers, not Megatron

    RunFolder(config.run.folder).require_unfinished()
    result = dry_run(config, hosts, gpu_memory_gib=gpu_memory_gib)
    typer.echo("\n".join(result.lines()), err=True)
    result.require_memory()
    return result


def _check(config: Config, num_workers: int | None, *, fresh: bool, reads_prompts: bool) -> "tuple[int, RunPlan]":
    """Checks a run on this machine as its workers will, and returns how many workers to start, and the plan.

    Args:
        reads_prompts: False if workers follow, the first of which reads the prompt file before anything else happens.
    """
    from megatron_tip.planning.inputs import default_num_workers  # late: a wrong key is reported before torch loads
    from megatron_tip.planning.plan import plan_run

    num_workers = num_workers or default_num_workers(config)
    plan = plan_run(config, num_workers, reads_prompts=reads_prompts)
    if config.diagnostics.every_steps:
        from megatron_tip.diagnostics.session import open_bank  # imports Megatron

        open_bank(config, plan)
    RunFolder(config.run.folder).require_unfinished()
    if not fresh:
        check_same_run(config)
    return num_workers, plan


def _described(config: Config, plan: "RunPlan") -> list[str]:
    from megatron_tip.planning.description import description_of  # late, as above

    return description_of(config, plan)


def _start(arguments: list[str], config: Config, num_workers: int) -> None:
    files = CheckpointFiles(RunFolder.create(config.run.folder).checkpoints)
    outcome = start_workers(
        [sys.executable, "-m", "megatron_tip.cli", *arguments],
        num_workers,
        threads=config.run.threads,
        grace_seconds=config.fault.grace_seconds,
        is_saved=lambda: bool(files.steps()),
    )
    end_as(outcome)


def _join(config: Config, *, fresh: bool) -> None:
    """Turns this process into a worker of the world that torchrun, srun or `_start` started."""
    restarted = is_restarted(os.environ)
    if restarted and RunFolder(config.run.folder).summary.exists():
        typer.echo(f"{config.run.folder} holds this job's finished run: nothing left to do", err=True)
        return
    run_worker(
        lambda: _work(config, fresh=fresh and not restarted),
        threads=config.run.threads,
        joins_servers=config.rollout.engine == "sglang",
    )


def _work(config: Config, *, fresh: bool) -> None:
    configure_logging(int(os.environ["RANK"]))
    with lean_imports():
        from megatron_tip.training.loop import train  # imports torch and Megatron: only in workers

    make_gauge = None
    if config.diagnostics.every_steps:
        from megatron_tip.diagnostics.gauge import make_gauge
    train(config, fresh=fresh, make_gauge=make_gauge)
