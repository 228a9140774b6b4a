"""`megatron-tip report`: the page about one or more runs."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_tip.commands.outcome import errors_reported


@errors_reported()
def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of one to six runs, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; default: report.html in the run's folder, of several here."),
    ] = None,
    max_megabytes: Annotated[
        float, typer.Option(min=0.0, help="Thin what the token inspector shows to that size.")
    ] = 10,
) -> None:
    """Write one HTML file about runs, side by side: curves, quadrants, time and memory, samples, every token.

    It opens from the disk and loads nothing.
    """
    from megatron_tip.report.page import write_report_page

    target = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    num_bytes = write_report_page(runs, target, max_bytes=round(max_megabytes * 1e6))
    typer.echo(f"{target}: {num_bytes / 1e6:.1f} MB")
