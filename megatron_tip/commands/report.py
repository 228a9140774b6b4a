"""`megatron-tip report`: an HTML page about one or more runs, or about a sweep."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_tip.commands.outcome import errors_reported


@errors_reported()
def command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of one to six runs, finished or not; or of a sweep.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: report.html in the run's folder; for several runs, here."),
    ] = None,
    max_megabytes: Annotated[
        float, typer.Option(min=0.0, help="Shorten the token inspector to keep the file below this size.")
    ] = 10,
) -> None:
    """Writes one HTML file that compares runs: curves, quadrants, time and memory, samples, every token.

    The file is self-contained: it opens from disk and loads nothing. A sweep's folder gets a table over seeds instead,
    as HTML and CSV.
    """
    from megatron_tip.report.page import write_report_page
    from megatron_tip.report.sweep_data import sweep_file
    from megatron_tip.report.sweep_page import write_sweep_page

    if len(runs) == 1 and sweep_file(runs[0]).exists():
        target = output or runs[0] / "sweep.html"
        num_bytes = write_sweep_page(runs[0], target)
        typer.echo(f"{target}: {num_bytes / 1e3:.1f} kB; the same as {target.with_suffix('.csv').name}")
        return
    target = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    num_bytes = write_report_page(runs, target, max_bytes=round(max_megabytes * 1e6))
    typer.echo(f"{target}: {num_bytes / 1e6:.1f} MB")
