"""report.png: how a run went, drawn from its metrics.jsonl."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from megatron_tip.files import atomic_write_bytes
from megatron_tip.observability.metrics_file import read_metrics
from megatron_tip.observability.run_folder import RunFolder

# Okabe and Ito's colours, distinguishable with every kind of colour vision.
_BLUE, _ORANGE = "#0072B2", "#D55E00"
_PHASE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7", "#999999")

Steps = Sequence[Mapping[str, Any]]


def write_report(folder: RunFolder) -> None:
    """Draws `report.png` from `metrics.jsonl`. A panel whose metrics are missing says so.

    Raises:
        InputError: metrics.jsonl is missing.
        OutputError: the picture cannot be written.
    """
    steps = read_metrics(folder.metrics)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(f"{folder.path.name}: {max((step['step'] for step in steps), default=0)} steps")
    panels: tuple[tuple[str, str, Callable[[Axes, Steps], None]], ...] = (
        ("Reverse KL, student to teacher", "nats per token", _draw_reverse_kl),
        ("Entropy of the next-token distributions", "nats per token", _draw_entropy),
        ("Tokens supervised", "share of valid response tokens", _draw_selected_share),
        ("Time by phase", "seconds per step", _draw_time),
    )
    for axes, (title, unit, draw) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        draw(axes, steps)
        _finish(axes, title, unit)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write_bytes(folder.report, picture.getvalue())


def _draw_reverse_kl(axes: Axes, steps: Steps) -> None:
    for name, kind in (("reverse_kl", ""), ("topk_reverse_kl", ", top-K")):
        _line(axes, steps, f"train/{name}", label=f"rollouts, before the step{kind}", color=_BLUE)
        style = {"color": _ORANGE, "marker": "o", "linestyle": "--"}
        _line(axes, steps, f"heldout/{name}", label=f"held-out prompts{kind}", **style)
    if any(min(line.get_ydata(), default=0) > 0 for line in axes.lines):  # pyright: ignore[reportArgumentType]
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(ScalarFormatter())


def _draw_entropy(axes: Axes, steps: Steps) -> None:
    _line(axes, steps, "train/student_entropy", label="student", color=_BLUE)
    _line(axes, steps, "train/teacher_entropy", label="teacher", color=_ORANGE, linestyle="--")
    axes.set_ylim(bottom=0)


def _draw_selected_share(axes: Axes, steps: Steps) -> None:
    _line(axes, steps, "selection/retention_ratio", label="selected", color=_BLUE)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_time(axes: Axes, steps: Steps) -> None:
    trained = [step for step in steps if step["step"] > 0]
    names = list(dict.fromkeys(name for step in trained for name in step if name.startswith("time/")))
    edges = [step["step"] - 0.5 for step in trained] + [step["step"] + 0.5 for step in trained[-1:]]
    below = [0.0] * len(trained)
    for name, colour in zip(names, itertools.cycle(_PHASE_COLOURS)):
        above = [low + (step.get(name) or 0.0) for low, step in zip(below, trained, strict=True)]
        label = name.removeprefix("time/").removesuffix("_seconds")
        axes.stairs(above, edges, baseline=below, fill=True, color=colour, label=label)
        below = above
    if names:
        # Next to the stack and in its order; on top, it would hide part of it.
        axes.legend(frameon=False, fontsize=9, reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _line(axes: Axes, steps: Steps, name: str, **style: Any) -> None:
    points = [(step["step"], step[name]) for step in steps if step.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), marker=style.pop("marker", "."), **style)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if axes.has_data():
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#666666")
