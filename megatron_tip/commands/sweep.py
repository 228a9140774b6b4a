"""`megatron-tip sweep`: rules x budgets x seeds, one run after the other here, or as a SLURM job array."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_tip.commands import train
from megatron_tip.commands.outcome import end_as, errors_reported
from megatron_tip.commands.run_command import look_beside
from megatron_tip.commands.submit import Submission, hosts_of, require_files
from megatron_tip.commands.submit import submit as submit_job
from megatron_tip.errors import ConfigError
from megatron_tip.parallel.launch import Outcome

if TYPE_CHECKING:
    from megatron_tip.commands.sweep_runs import Sweep, SweepRun


@errors_reported()
def command(
    sweep_path: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="config, folder, rules, budgets, seeds.")],
    nproc: Annotated[int | None, typer.Option(min=1, help="Workers of each run here, as for train.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit a SLURM job array instead of running here.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="With --submit: nodes of each run.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="With --submit: as for submit.")] = None,
    gpu_memory: Annotated[float, typer.Option(help="With --submit: GiB of each GPU, for the check.")] = 80.0,
    sbatch: Annotated[list[str] | None, typer.Option(help="With --submit: an sbatch option; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print what would run, stop.")] = False,
    run: Annotated[
        int | None, typer.Option(min=0, help="Print the configuration file and the overrides of this run, stop.")
    ] = None,
) -> None:
    """Compares rules at budgets over seeds, each as an ordinary run in a folder of its own.

    The same command continues a sweep: it skips finished runs. `megatron-tip report FOLDER` puts them side by side.
    """
    from megatron_tip.commands.sweep_runs import load_sweep, runs_of, unfinished  # imports torch
    from megatron_tip.report.sweep_data import write_sweep

    sweep = load_sweep(sweep_path)
    look_beside(sweep.config)
    runs = runs_of(sweep)
    if run is not None:
        _print_run(runs, run)
        return
    left = unfinished(runs)
    if dry_run and not submit:
        for place, one in enumerate(runs):
            typer.echo(f"{'to run  ' if place in left else 'finished'} {one.entry.name}")
        return
    if not dry_run:
        write_sweep(sweep.folder, [one.entry for one in runs])
    if submit and left:
        options = [f"--array={','.join(map(str, left))}", *(sbatch or [])]
        submission = Submission(sweep_path, nodes=nodes, script="sweep", options=options, gpus_per_node=gpus_per_node)
        _submit(submission, runs[left[0]], sweep, gpu_memory, dry_run=dry_run)
    else:
        _run_here([runs[place] for place in left], nproc)
        typer.echo(f"the sweep's runs are finished; megatron-tip report {sweep.folder}")


def _print_run(runs: Sequence["SweepRun"], place: int) -> None:
    if place >= len(runs):
        raise ConfigError(f"--run: expected at most {len(runs) - 1}, got {place}")
    typer.echo("\n".join([str(runs[place].config_path), *runs[place].overrides]))


def _submit(submission: Submission, first: "SweepRun", sweep: "Sweep", gpu_memory: float, *, dry_run: bool) -> None:
    """Checks the first run for the job's nodes and submits the array."""
    config = first.config()
    checked = train.check_elsewhere(config, hosts_of(submission), gpu_memory)
    if not dry_run:
        require_files(checked.absent)
    of_sweep = config.model_copy(update={"run": config.run.model_copy(update={"folder": sweep.folder})})
    typer.echo(submit_job(submission, of_sweep, dry_run=dry_run))


def _run_here(runs: Sequence["SweepRun"], nproc: int | None) -> None:
    """Runs one after the other. Ends the command if a signal stops it, or at the end if runs failed."""
    failed: list[str] = []
    for number, run in enumerate(runs, start=1):
        typer.echo(f"run {number} of {len(runs)}: {run.entry.name}", err=True)
        workers = [f"--nproc={nproc}"] if nproc else []
        arguments = ["train", str(run.config_path), *run.overrides, *workers]
        code, stop = _ended([sys.executable, "-m", "megatron_tip.cli", *arguments])
        if stop:
            end_as(Outcome(code or 128 + stop, f"stopped by {signal.Signals(stop).name} in {run.entry.name}"))
        if code:
            failed.append(f"{run.entry.name} (exit code {code})")
    if failed:
        end_as(Outcome(1, f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}"))


def _ended(arguments: Sequence[str]) -> tuple[int, int]:
    """Returns a command's exit code, and the signal that was passed on to it, 0 without one.

    The command has a session of its own, so that a Ctrl-C reaches it once: a second one would stop it without saving.
    """
    process = subprocess.Popen(arguments, start_new_session=True)
    received = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait(), received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
