"""A plan as one HTML file, in the look of the report page: phases on a time line, memory by phase, bytes by link."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tip import __version__
from megatron_tip.files import atomic_write_text, output_errors
from megatron_tip.planning.memory_estimate import UNCOUNTED_SHARE
from megatron_tip.report.templates import page_template, read_asset
from megatron_tip.simulation.plan import Plan, PlannedRank
from megatron_tip.simulation.report import largest_messages
from megatron_tip.simulation.shares import Variation
from megatron_tip.simulation.timing import STEP_PHASES

_GIB = 2**30
_WIDTH, _HEIGHT, _BASE = 1000.0, 190.0, 220.0
_NUM_COLOURS = 8
_PHASES = ("rollout", *STEP_PHASES)


def write_plan_page(plan: Plan, target: Path, shares: Sequence[Variation] = ()) -> None:
    """Writes `plan` as a page that loads nothing. `shares`: of the phases, in changed configurations.

    Raises:
        OutputError: the file cannot be written.
    """
    atomic_write_text(target, page_of(plan, shares), setting="--html")


def require_writable(target: Path) -> None:
    """Makes the page's folder, before a plan takes its time.

    Raises:
        OutputError: a file cannot be written there.
    """
    with output_errors(target, setting="--html"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target.parent))


def page_of(plan: Plan, shares: Sequence[Variation] = ()) -> str:
    """Returns the page's HTML."""
    return page_template("plan.html.jinja", "megatron_tip.simulation").render(
        name=plan.config.run.folder.name,
        subtitle=f"{plan.hosts.workers} x {plan.device.name}, {plan.hosts.workers_per_node} per node",
        version=__version__,
        style=read_asset("report.css"),
        overview=_overview(plan),
        phases=[{"name": phase, "colour": place} for place, phase in enumerate(_PHASES)],
        batches=[_batch(plan, name) for name in plan.generation],
        shares=[_shares(one) for one in shares],
        set_aside=round(100 * UNCOUNTED_SHARE),
        memory=[_memory(plan, rank) for rank in plan.ranks if rank.batch == next(iter(plan.generation))],
        messages=_messages(plan),
        notes=[
            f"device: {plan.device.source}",
            "shares of the peaks: devices.toml",
            *plan.notes,
        ],
    )


def _overview(plan: Plan) -> list[tuple[str, str]]:
    missing = plan.missing_bytes / _GIB
    rows = [("layouts", plan.outline.grids_in_words())]
    fits = f"fits, {-missing:.1f} GiB are free" if plan.fits else f"does not fit: {missing:.1f} GiB are missing"
    rows.append(("memory", fits))
    for batch, generation in plan.generation.items():
        seconds = plan.step_seconds(batch)
        text = f"{seconds:.1f} s a step, {generation.num_tokens / seconds:,.0f} response tokens per second"
        rows.append((f"{batch} batch", f"{text}, {plan.gpu_hours(batch):,.0f} GPU hours a run"))
    return rows


def _batch(plan: Plan, batch: str) -> dict[str, Any]:
    """Returns a time line for each kind of rank: a phase begins when the slowest rank has ended the one before."""
    generation = plan.generation[batch].seconds
    slowest = {"rollout": generation, **plan.phase_seconds(batch)}
    scale = _WIDTH / sum(slowest.values())
    lines = []
    for rank in plan.ranks:
        if rank.batch != batch:
            continue
        start, bars = 0.0, []
        for colour, phase in enumerate(_PHASES):
            seconds = generation if phase == "rollout" else rank.seconds[phase]
            title = f"{phase}: {seconds:.2f} s"
            bars.append({"x": _round(start), "width": _round(seconds * scale), "colour": colour, "title": title})
            start += slowest[phase] * scale
        label = ", ".join(str(bar["title"]) for bar in bars)
        lines.append({"name": str(rank.kind), "bars": bars, "label": label})
    ahead = "; rollouts are generated ahead, while the step before trains" if plan.config.rollout.ahead else ""
    return {"name": batch, "caption": f"{plan.step_seconds(batch):.1f} s{ahead}", "lines": lines}


def _shares(one: Variation) -> dict[str, Any]:
    """Returns a row of the table of shares; a refused configuration has its refusal in place of the numbers."""
    if one.seconds is None:
        return {"name": one.name, "refusal": one.refusal, "cells": {}}
    cells = {phase: f"{100 * share:.1f}" for phase, share in one.shares.items()}
    return {"name": one.name, "refusal": "", "cells": {"seconds": f"{one.step_seconds:.1f}"} | cells}


def _memory(plan: Plan, rank: PlannedRank) -> dict[str, Any]:
    """Returns stacked bars by phase; the largest purposes have colours of their own."""
    sizes: dict[str, float] = {}
    for parts in rank.live.values():
        for name, size in parts.items():
            sizes[name] = max(size, sizes.get(name, 0.0))
    named = sorted(sizes, key=lambda name: -sizes[name])[: _NUM_COLOURS - 1]
    limit = plan.device.usable_bytes
    scale = _HEIGHT / max(rank.peak_bytes, limit)
    each = _WIDTH / len(rank.live)
    bars, labels = [], []
    for column, (phase, parts) in enumerate(rank.live.items()):
        top = _BASE
        shown = {name: parts.get(name, 0.0) for name in named}
        shown["other"] = sum(size for name, size in parts.items() if name not in named)
        for colour, (name, size) in enumerate(shown.items()):
            top -= size * scale
            place = {"x": _round(column * each + 12), "y": _round(top), "width": _round(each - 24)}
            bars.append(place | {"height": _round(size * scale), "colour": colour, "title": f"{name}: {_gib(size)}"})
        middle = _round((column + 0.5) * each)
        labels.append({"x": middle, "y": 236, "text": phase})
        labels.append({"x": middle, "y": _round(top - 4), "text": _gib(sum(parts.values()))})
    return {
        "name": str(rank.kind),
        "caption": f"{_gib(rank.peak_bytes)} in {rank.peak_phase}",
        "bars": bars,
        "labels": labels,
        "limit": _gib(limit),
        "limit_y": _round(_BASE - limit * scale),
        "parts": [{"name": name, "colour": colour} for colour, name in enumerate([*named, "other"])],
    }


def _messages(plan: Plan) -> list[dict[str, Any]]:
    found = largest_messages(plan)
    most = max((size for _, size in found), default=1.0)
    return [
        {
            "name": f"{phase}: {group}",
            "title": f"{phase}, {group}, {'between nodes' if between else 'within a node'}: {_gib(size)}",
            "width": _round(560 * size / most),
            "size": _gib(size),
            "colour": 4 if between else 0,
        }
        for (phase, group, between), size in found
    ]


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def _round(value: float) -> float:
    return round(value, 1)
