"""What a search found, as text of 80 columns, and as values for JSON."""

import shlex
from collections.abc import Sequence
from typing import Any

from megatron_tip.simulation.plan import TYPICAL, Plan
from megatron_tip.simulation.report import wrap_line
from megatron_tip.simulation.search import Search

_GIB = 2**30
_WIDTH = 80
_INDENT = "      "


def as_text(search: Search, given: Sequence[str], gpus: str) -> str:
    """Returns the best layouts as a table for people.

    Args:
        given: the overrides of the command line, which the printed ones come after.
        gpus: their number and kind, in words.
    """
    lines = [
        f"layouts for {gpus}, the fastest first",
        f"step: a {TYPICAL} one; tokens: of its responses; GiB: the fullest GPU's in the",
        "longest batch; overrides: to paste behind `train CONFIG.toml`",
        "",
        f"{'':>10}{'step, s':>9}{'tokens/s':>11}{'GiB':>8}",
        *_row("as it is", search.configured, given, []),
    ]
    for place, one in enumerate(search.best, start=1):
        lines += _row(str(place), one.plan, given, one.overrides)
    if not search.best:
        lines += ["", "no layout fits"]
    if search.too_large:
        lines += ["", "do not fit, the closest first:"]
    for one in search.too_large:
        missing = one.missing_bytes / _GIB
        lines.append(f"{f'{missing:.1f}' if missing >= 0.1 else '<0.1':>7} GiB are missing")
        lines += _pasted(given, one.overrides)
    return "\n".join(lines)


def as_values(search: Search, given: Sequence[str]) -> dict[str, Any]:
    """Returns the same as JSON values."""
    configured = search.configured
    return {
        "as_configured": _values(configured) if isinstance(configured, Plan) else {"refused": str(configured)},
        "best": [{"overrides": [*given, *one.overrides], **_values(one.plan)} for one in search.best],
        "too_large": [
            {"overrides": [*given, *one.overrides], "missing_bytes": one.missing_bytes} for one in search.too_large
        ],
        "num_layouts": search.num_layouts,
        "num_estimated": search.num_estimated,
        "num_simulated": search.num_simulated,
    }


def _values(plan: Plan) -> dict[str, Any]:
    seconds = plan.step_seconds(TYPICAL)
    return {
        "student": plan.outline.student_grid.sizes(),
        "teacher": plan.outline.teacher_grid.sizes(),
        "fits": plan.fits,
        "missing_bytes": max(0.0, plan.missing_bytes),
        "peak_bytes": plan.fullest.peak_bytes,
        "peak_phase": plan.fullest.peak_phase,
        "step_seconds": seconds,
        "response_tokens_per_second": plan.generation[TYPICAL].num_tokens / seconds,
        "phase_seconds": {"rollout": plan.generation[TYPICAL].seconds, **plan.phase_seconds(TYPICAL)},
        "gpu_hours": plan.gpu_hours(TYPICAL),
    }


def _row(name: str, plan: Plan | Exception, given: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Returns the lines of one layout: its values, its sizes, and what to paste behind `train CONFIG.toml`."""
    if not isinstance(plan, Plan):
        return wrap_line(f"{name:<10}refused: {plan}")
    seconds = plan.step_seconds(TYPICAL)
    rate = plan.generation[TYPICAL].num_tokens / seconds
    missing = "" if plan.fits else f"  {plan.missing_bytes / _GIB:.1f} GiB are missing"
    numbers = f"{name:<10}{seconds:>9.1f}{rate:>11,.0f}{plan.fullest.peak_bytes / _GIB:>8.1f}{missing}"
    return [numbers, *wrap_line(_INDENT + plan.outline.grids_in_words()), *_pasted(given, overrides)]


def _pasted(given: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Returns the overrides as a shell takes them, over several lines if they are long."""
    words = [shlex.quote(word) for word in [*given, *overrides]]
    lines = [""]
    for word in words:
        if lines[-1] and len(_INDENT + lines[-1] + " " + word + " \\") > _WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    ends = [*[" \\"] * (len(lines) - 1), ""]
    return [_INDENT + line + end for line, end in zip(lines, ends, strict=True)] if words else []
