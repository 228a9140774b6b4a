"""The command `megatron-tip`. Each subcommand has its own file in `commands`."""

from typing import Annotated

import typer

from megatron_tip import __version__
from megatron_tip.commands import doctor, evaluate, plan, report, submit, sweep, train
from megatron_tip.commands.diagnose import diagnose
from megatron_tip.commands.run_command import RunCommand
from megatron_tip.observability.logs import hide_warnings_of_libraries

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("train", cls=train.TrainCommand)(train.command)
app.command("plan", cls=RunCommand)(plan.command)
app.command("submit", cls=RunCommand)(submit.command)
app.command("sweep")(sweep.command)
app.command("report")(report.command)
app.command("eval")(evaluate.command)
app.command("doctor", cls=RunCommand)(doctor.command)
app.add_typer(diagnose, name="diagnose")


def main() -> None:
    """Runs the command line; the console script's entry point."""
    app()


@app.callback(invoke_without_command=True, help="Token-selective on-policy distillation on Megatron-Core.")
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    hide_warnings_of_libraries()
    if show_version:
        typer.echo(f"megatron-tip {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
