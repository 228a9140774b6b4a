"""The command `megatron-tip`."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperCommand

from megatron_tip import __version__
from megatron_tip.config import Config
from megatron_tip.config_io import dump_config, load_config, reference
from megatron_tip.errors import ConfigError, InputError, MegatronTipError, WeightsError
from megatron_tip.observability.logs import configure_logging
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.parallel.environment import is_restarted, is_worker
from megatron_tip.parallel.launch import run_worker, start_workers
from megatron_tip.training.same_run import check_same_run

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the console script."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Token-selective on-policy distillation on Megatron-Core."""
    if show_version:
        typer.echo(f"megatron-tip {__version__}")
        raise typer.Exit


class _TrainCommand(TyperCommand):
    """Its help ends with the reference of the configuration."""

    def format_epilog(self, ctx, formatter) -> None:
        formatter.write("\n" + reference())


@app.command(cls=_TrainCommand)
def train(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The run; its keys are listed below.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Workers to start on this machine. Default: one a GPU; without a GPU the fewest that hold both "
            "models. Ignored where torchrun or srun already started the workers.",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Remove the unfinished run in run.folder and start anew; without it the run is continued. Ignored "
            "where SLURM or torchrun starts the same job again.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the resolved configuration, stop.")] = False,
) -> None:
    """Distil a teacher into a student.

    Starts the workers on this machine, or joins them where torchrun or srun already did. An unfinished run in
    run.folder is continued from its newest checkpoint.

    Exit codes: 0 the run is finished; 2 the input is refused; 128 + n the command was ended by signal n; 75 a worker
    was told to stop and has saved (a second signal: 128 + n, nothing saved); 1 any other error. Whatever the code, the
    same command continues the run from its newest checkpoint.
    """
    with _errors_reported():
        config = load_config(config_path, overrides or [])
        joins = is_worker(os.environ) and not dry_run
        if joins:
            run_worker(lambda: _train(config, fresh=fresh and not is_restarted(os.environ)), threads=config.run.threads)
            return
        num_workers = nproc or _default_num_workers(config)
        _check(config, num_workers, fresh=fresh)
        if dry_run:
            typer.echo(dump_config(config), nl=False)
            return
        RunFolder.create(config.run.folder)
        command = [sys.executable, "-m", "megatron_tip.cli", "train", str(config_path), *(overrides or [])]
        outcome = start_workers(
            command + ["--fresh"] * fresh,
            num_workers,
            threads=config.run.threads,
            grace_seconds=config.fault.grace_seconds,
        )
    if outcome.exit_code:
        screen = Console(stderr=True)
        if screen.is_terminal:  # a worker that was ended over its progress bar left the cursor hidden behind it
            screen.show_cursor()
            screen.line()
        _fail(outcome.message, exit_code=outcome.exit_code)


def _check(config: Config, num_workers: int, *, fresh: bool) -> None:
    from megatron_tip.training.plan import plan_run  # imports torch and transformers, not Megatron

    plan_run(config, num_workers)
    if not fresh:
        check_same_run(config)


def _train(config: Config, *, fresh: bool) -> None:
    configure_logging(int(os.environ["RANK"]))
    from megatron_tip.training.loop import train as train_loop  # imports torch and Megatron: in the workers alone

    train_loop(config, fresh=fresh)


def _default_num_workers(config: Config) -> int:
    import torch  # after the configuration has been read: a wrong key is reported before torch's seconds

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    student, teacher = config.model, config.teacher
    return math.lcm(
        student.tensor_parallel_size * student.pipeline_parallel_size,
        teacher.tensor_parallel_size * teacher.pipeline_parallel_size,
    )


@contextmanager
def _errors_reported() -> Iterator[None]:
    """What was wrong before anything started ends the command with a message: exit code 2 for the user's input."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("ended by SIGINT", exit_code=130)
    except MegatronTipError as error:
        _fail(str(error), exit_code=2 if isinstance(error, ConfigError | InputError | WeightsError) else 1)


def _fail(message: str, *, exit_code: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
