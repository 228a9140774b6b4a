"""The report page: the runs' data, the scripts that draw it, and the plotting library, in one file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from megatron_tip import __version__
from megatron_tip.errors import InputError
from megatron_tip.files import atomic_write_text, output_errors
from megatron_tip.report.overview import config_rows, evaluation_rows, heldout_warning, overview_rows, sample_rows
from megatron_tip.report.packing import packed, packed_json
from megatron_tip.report.run_data import RunData, read_runs
from megatron_tip.report.templates import page_template, read_asset
from megatron_tip.report.tokens import LADDER, Blocks, Detail, RunPacker, statistic_labels
from megatron_tip.report.visible_text import visible

MAX_BYTES = 10 * 10**6
SCRIPTS = tuple(
    f"{name}.js"
    for name in ("decode", "theme", "figures", "timeline", "quadrants", "candidates", "inspector", "keys", "main")
)
MOST_RUNS = 6
"""The most runs that colours and dashes can distinguish."""


def write_report_page(paths: Sequence[Path], target: Path, *, max_bytes: int = MAX_BYTES) -> int:
    """Writes one HTML file about the runs in folders `paths` to `target`; returns its size in bytes.

    The token inspector loses detail, and then views, until the page has at most `max_bytes`; the page says so.

    Raises:
        InputError: there are no runs, or more than the page can distinguish; a folder is not a run's; or the page
            cannot be that small. OutputError: the file cannot be written.
    """
    if not 1 <= len(paths) <= MOST_RUNS:
        raise InputError(f"report: expected 1 to {MOST_RUNS} run folders, got {len(paths)}; give fewer")
    runs = read_runs(paths)
    render = _renderer(runs)
    page, smallest = "", 0
    packers = [RunPacker(run.tables) for run in runs]
    curves = [_curves(run) for run in runs]
    room = max_bytes - len(render(curves, []).encode())
    for manifests, blocks in _packings(packers, room):
        page = render([{**one, **views} for one, views in zip(curves, manifests, strict=True)], blocks)
        smallest = len(page.encode())
        if smallest <= max_bytes:
            break
    else:
        raise InputError(
            f"report: expected a page of at most {max_bytes / 1e6:.1f} MB, got {smallest / 1e6:.1f} MB without any "
            "view; allow more (--max-megabytes) or give fewer runs"
        )
    with output_errors(target, setting="--output"):
        target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target, page, setting="--output")
    return smallest


def _packings(packers: Sequence[RunPacker], room: int) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Yields the runs' manifests and all blocks, smaller each time: less detail, then every second view, then none.

    Skips a packing that exceeds `room` characters by an estimate from a sample of the responses.
    """
    for detail in LADDER:
        if sum(packer.estimate(detail) for packer in packers) <= room:
            yield _packing(packers, detail, 1)
    every, most = 2, max(len(packer.tables) for packer in packers)
    while every < 2 * most:
        yield _packing(packers, LADDER[-1], every)
        every *= 2
    yield _packing(packers, LADDER[-1], 0)


def _packing(packers: Sequence[RunPacker], detail: Detail, every_view: int) -> tuple[list[dict[str, Any]], list[str]]:
    blocks = Blocks()
    return [packer.pack(blocks, detail, every_view=every_view) for packer in packers], blocks.blocks


def _curves(run: RunData) -> dict[str, Any]:
    """Returns what the page's figures draw of a run, apart from its views."""
    return {
        "name": visible(run.name),
        "steps": run.steps,
        "stride": run.stride,
        "metrics": run.metrics,
        "timeline": [
            {**step, "phases": [[visible(name), *numbers] for name, *numbers in step["phases"]]}
            for step in run.timeline
        ],
    }


def _renderer(runs: Sequence[RunData]) -> Any:
    """Returns a function that makes a page of manifests and blocks; the parts common to all attempts are made once."""
    template = page_template("report.html.jinja")
    fixed = {
        "names": [run.name for run in runs],
        "version": __version__,
        "style": read_asset("report.css"),
        "script": "\n".join(read_asset(name) for name in SCRIPTS),
        "library": packed(get_plotlyjs().encode(), level=9),
        "overview": overview_rows(runs),
        "config": config_rows(runs),
        "evaluations": evaluation_rows(runs),
        "samples": sample_rows(runs),
        "warning": heldout_warning(runs),
        "notes": [(run.name, note) for run in runs for note in run.notes],
        "has_views": any(run.tables for run in runs),
    }

    labels = statistic_labels()

    def render(manifests: list[dict[str, Any]], blocks: list[str]) -> str:
        return template.render(**fixed, data=packed_json({"runs": manifests, "labels": labels}), blocks=blocks)

    return render
