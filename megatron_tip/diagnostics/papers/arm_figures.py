"""Figures about live interventions: all rules at one budget, the budget sweep, the support sizes."""

from pathlib import Path

import numpy as np
import pandas as pd

from megatron_tip.diagnostics.papers.arm_tables import by_support_size
from megatron_tip.diagnostics.papers.frames import errors, numbers, rows
from megatron_tip.diagnostics.papers.style import (
    COLOURS,
    DASHES,
    MARKERS,
    draw_by_support_size,
    figure,
    legend_below,
    save,
)

SWEPT = (
    "ta_opd_teachability",
    "ta_opd_divergence",
    "ta_opd_incompatible",
    "tip_soft_or",
    "ta_opd_entropy",
    "random",
    "ta_opd_q3_only",
)


def selectors(data: pd.DataFrame, support_size: int, ratio: float, path: Path) -> None:
    """Draws every rule's gain on held-out contexts at the main budget, best on top, and plain distillation's."""
    own = rows(data, k=support_size, ratio=(ratio, 1.0)).sort_values("gain", ascending=False)
    with figure(6, 4.6) as drawn:
        axes = drawn.subplots()
        places = np.arange(len(own))
        for place, (name, gain, error) in enumerate(zip(own["rule"], own["gain"], errors(own).T, strict=True)):
            family = _family(name)
            axes.errorbar(gain, place, xerr=error[:, None], fmt=MARKERS[family], color=COLOURS[family], capsize=2)
        axes.axvline(0, color="#999999", linewidth=0.8)
        axes.set_yticks(places, own["rule"], fontsize=7)
        axes.invert_yaxis()
        axes.set(
            xlabel="gain on held-out contexts, nats per token",
            title=f"Trained on {100 * ratio:g} % of the tokens (full: all)",
        )
        handles = [
            axes.plot([], [], MARKERS[family], color=COLOURS[family], label=label)[0]
            for family, label in enumerate(("TA-OPD", "TIP", "random, full"))
        ]
        axes.legend(handles=handles)
        save(drawn, own, path)


def _family(rule: str) -> int:
    return 0 if rule.startswith("ta_opd") else 1 if rule.startswith("tip") else 2


def budget_sweep(data: pd.DataFrame, support_size: int, path: Path) -> None:
    """Draws the gain, and the gain per kept share, over the budget for the papers' main selectors."""
    own = rows(data, k=support_size, rule=SWEPT).sort_values("ratio")
    with figure(7, 3.3) as drawn:
        panels = drawn.subplots(1, 2)
        for axes, column, title in zip(
            panels, ("gain", "gain_per_keep"), ("gain, nats per token", "gain / kept share"), strict=True
        ):
            for place, rule in enumerate(SWEPT):
                line = rows(own, rule=rule)
                shift = 1 + 0.02 * (place - 3)  # so that intervals do not overlap
                scale = 1 if column == "gain" else numbers(line, "kept_share")
                axes.errorbar(
                    100 * numbers(line, "ratio") * shift,
                    line[column],
                    yerr=errors(line) / scale,
                    label=rule if len(line) else f"{rule} (not tried)",
                    color=COLOURS[place],
                    marker=MARKERS[place],
                    linestyle=DASHES[place],
                    capsize=2,
                    elinewidth=0.7,
                )
            axes.axhline(0, color="#999999", linewidth=0.8)
            axes.set_xscale("log")
            ticks = sorted(own["ratio"].unique())
            axes.set_xticks([100 * tick for tick in ticks], [f"{100 * tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_xlim(100 * min(ticks, default=1) / 1.3, 100 * max(ticks, default=1) * 1.3)
            axes.set(xlabel="tokens kept, %", title=title)
        legend_below(drawn, panels[0], 4)
        save(drawn, own, path)


def support_sizes(data: pd.DataFrame, ratio: float, path: Path) -> None:
    """Draws the gain at each K of the rules tried at several; marks a rule that lacks one of them."""
    own = by_support_size(data, ratio)
    sizes = sorted(own["k"].unique())
    labels = {}
    for name in dict.fromkeys(own["rule"]):
        missing = [str(size) for size in sizes if not len(rows(own, rule=name, k=size))]
        labels[name] = f"{name} (no K = {', '.join(missing)})" if missing else name
    with figure(6, 1.1 + 0.28 * max(4, len(labels))) as drawn:
        axes = drawn.subplots()
        title = f"Support size, at {100 * ratio:g} % of the tokens"
        if labels:
            draw_by_support_size(axes, own, "rule", sizes, value="gain", labels=labels)
            axes.set(xlabel="gain on held-out contexts, nats per token", title=title)
            legend_below(drawn, axes, len(sizes))
        else:
            axes.set_axis_off()
            axes.set_title(title)
            axes.text(0, 0.5, "No rule was tried at more than one K.", transform=axes.transAxes)
        save(drawn, own, path)
