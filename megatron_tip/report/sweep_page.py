"""The page of a sweep: its rules and budgets side by side, each with an interval over seeds."""

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from megatron_tip import __version__
from megatron_tip.errors import InputError
from megatron_tip.files import atomic_write_text, output_errors
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.report.seeds import LEVEL
from megatron_tip.report.sweep_data import Arm, read_sweep
from megatron_tip.report.templates import page_template, read_asset
from megatron_tip.report.visible_text import visible

_MEASURES = (
    ("heldout_before", "Held-out divergence before", ("heldout_reverse_kl", "before"), 1.0, "{:.4f}"),
    ("heldout_after", "after, nats per token", ("heldout_reverse_kl", "after"), 1.0, "{:.4f}"),
    ("retention_percent", "Tokens supervised, %", ("retention_ratio", "got"), 100.0, "{:.2f}"),
    ("seconds", "Seconds", ("seconds", "total"), 1.0, "{:.0f}"),
)
"""Column of the CSV file, head of the page's, place in a run's summary, factor, and how a number is written."""


def write_sweep_page(folder: Path, target: Path) -> int:
    """Writes the page about the sweep in `folder` to `target`, and beside it a CSV file; returns the page's bytes.

    Raises:
        InputError: the folder is not a sweep's, or none of its runs is finished. OutputError: a file cannot be written.
    """
    arms = read_sweep(folder)
    if not any(arm.summaries for arm in arms):
        raise InputError(f"{folder}: expected a sweep with a finished run, got {len(arms)} arms without one")
    page = page_template("sweep.html.jinja").render(
        name=visible(folder.resolve().name),
        version=__version__,
        style=read_asset("report.css"),
        heads=[head for _, head, *_ in _MEASURES],
        rows=[_row(arm, target.parent) for arm in arms],
        level=f"{LEVEL:.0%}",
    )
    with output_errors(target, setting="--output"):
        target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target, page, setting="--output")
    atomic_write_text(target.with_suffix(".csv"), _csv(arms), setting="--output")
    return len(page.encode())


def _row(arm: Arm, place: Path) -> dict[str, object]:
    """Returns what a page in the folder `place` says of an arm, with links to the pictures of its finished runs."""
    texts = []
    for _, _, path, factor, pattern in _MEASURES:
        mean, half = (factor * number for number in arm.interval(*path))
        if math.isnan(mean):
            texts.append("not measured")
        else:
            texts.append(pattern.format(mean) + ("" if math.isnan(half) else f" ± {pattern.format(half)}"))
    runs = [(seed, _link(RunFolder(arm.folders[seed]).report, place)) for seed in arm.summaries]
    missing = f"missing: {', '.join(map(str, arm.missing))}" if arm.missing else ""
    rule, budget = visible(arm.rule), f"{arm.budget:.4g}"
    return {"rule": rule, "budget": budget, "runs": runs, "missing": missing, "texts": texts}


def _link(path: Path, place: Path) -> str:
    return quote(os.path.relpath(path.resolve(), place.resolve()))


def _csv(arms: Sequence[Arm]) -> str:
    """Returns one line per arm: rule, budget, seeds, and of each measure the mean and half the interval's width."""
    content = io.StringIO()
    names = [name for column, *_ in _MEASURES for name in (f"{column}_mean", f"{column}_half")]
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["rule", "budget", "seeds", *names])
    for arm in arms:
        numbers = [factor * number for _, _, path, factor, _ in _MEASURES for number in arm.interval(*path)]
        writer.writerow([arm.rule, arm.budget, len(arm.summaries), *("" if math.isnan(n) else n for n in numbers)])
    return content.getvalue()
