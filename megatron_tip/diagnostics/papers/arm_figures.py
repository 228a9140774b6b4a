"""Figures about live interventions: all rules at one budget, the budget sweep, the support sizes."""

from pathlib import Path

import numpy as np
import pandas as pd

from megatron_tip.diagnostics.papers.arm_tables import main_ratio
from megatron_tip.diagnostics.papers.frames import errors, in_order, numbers, rows
from megatron_tip.diagnostics.papers.style import COLOURS, DASHES, MARKERS, figure, save

SWEPT = (
    "ta_opd_teachability",
    "ta_opd_divergence",
    "ta_opd_incompatible",
    "tip_soft_or",
    "ta_opd_entropy",
    "random",
    "ta_opd_q3_only",
)


def selectors(data: pd.DataFrame, support_size: int, path: Path) -> None:
    """Every rule's gain on held-out contexts at the main budget, the best on top, and plain distillation."""
    ratio = main_ratio(data)
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
            xlabel="gain on held-out contexts, nats a token", title=f"Trained on {ratio:.0%} of the tokens (full: all)"
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
    """Gain, and gain a kept share, over the budget for the papers' main selectors."""
    own = rows(data, k=support_size, rule=SWEPT).sort_values("ratio")
    with figure(7, 2.9) as drawn:
        panels = drawn.subplots(1, 2)
        for axes, column, title in zip(
            panels, ("gain", "gain_per_keep"), ("gain, nats a token", "gain / kept share"), strict=True
        ):
            for place, rule in enumerate(SWEPT):
                line = rows(own, rule=rule)
                shift = 1 + 0.02 * (place - 3)  # so that intervals do not lie upon each other
                scale = 1 if column == "gain" else numbers(line, "kept_share")
                axes.errorbar(
                    100 * numbers(line, "ratio") * shift,
                    line[column],
                    yerr=errors(line) / scale,
                    label=rule,
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
            axes.set(xlabel="tokens kept, %", title=title)
        panels[1].legend(fontsize=6.5)
        save(drawn, own, path)


def support_sizes(data: pd.DataFrame, path: Path) -> None:
    """The gain of the rules that depend on K, at each K."""
    ratio = main_ratio(data)
    sizes = sorted(data["k"].unique())
    own = rows(data, ratio=ratio)
    tried = {name: len(rows(own, rule=name)) for name in dict.fromkeys(own["rule"])}
    names = [name for name, count in tried.items() if count == len(sizes) > 1]
    own = rows(own, rule=names)
    with figure(6, 0.8 + 0.25 * max(4, len(names))) as drawn:
        axes = drawn.subplots()
        for place, size in enumerate(sizes):
            line = in_order(rows(own, k=size), "rule", names)
            offset = np.arange(len(names)) + 0.22 * (place - (len(sizes) - 1) / 2)
            axes.errorbar(
                line["gain"],
                offset,
                xerr=errors(line),
                fmt=MARKERS[place % 7],
                color=COLOURS[place % 7],
                label=f"K = {size}",
                capsize=2,
            )
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="gain on held-out contexts, nats a token", title=f"Support size, at {ratio:.0%}")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(sizes))
        save(drawn, own, path)
