"""Figures about live interventions: all rules at one budget, the budget sweep, the support sizes."""

from pathlib import Path

import numpy as np
import pandas as pd

from megatron_tip.diagnostics.papers.arm_tables import main_ratio
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
    own = data[(data["k"] == support_size) & ((data["ratio"] == ratio) | (data["rule"] == "full"))]
    own = own.sort_values("gain", ascending=False)
    with figure(6, 4.6) as drawn:
        axes = drawn.subplots()
        places = np.arange(len(own))
        errors = np.abs(own[["low", "high"]].to_numpy() - own[["gain"]].to_numpy()).T
        for place, (name, gain, error) in enumerate(zip(own["rule"], own["gain"], errors.T, strict=True)):
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
    own = data[(data["k"] == support_size) & data["rule"].isin(SWEPT)].sort_values("ratio")
    with figure(7, 2.9) as drawn:
        panels = drawn.subplots(1, 2)
        for axes, column, title in zip(
            panels, ("gain", "gain_per_keep"), ("gain, nats a token", "gain / kept share"), strict=True
        ):
            for place, rule in enumerate(SWEPT):
                line = own[own["rule"] == rule]
                shift = 1 + 0.02 * (place - 3)  # so that intervals do not lie upon each other
                scale = 1 if column == "gain" else line["kept_share"]
                errors = np.abs(line[["low", "high"]].sub(line["gain"], axis=0)).div(scale, axis=0).to_numpy().T
                axes.errorbar(
                    100 * line["ratio"] * shift,
                    line[column],
                    yerr=errors,
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
    own = data[(data["ratio"] == ratio)]
    names = [name for name, found in own.groupby("rule") if found["k"].nunique() == len(sizes) and len(sizes) > 1]
    own = own[own["rule"].isin(names)]
    with figure(6, 0.8 + 0.25 * max(4, len(names))) as drawn:
        axes = drawn.subplots()
        for place, size in enumerate(sizes):
            line = own[own["k"] == size].set_index("rule").reindex(names)
            offset = np.arange(len(names)) + 0.22 * (place - (len(sizes) - 1) / 2)
            errors = np.abs(line[["low", "high"]].to_numpy() - line[["gain"]].to_numpy()).T
            axes.errorbar(
                line["gain"],
                offset,
                xerr=errors,
                fmt=MARKERS[place % 7],
                color=COLOURS[place % 7],
                label=f"K = {size}",
                capsize=2,
            )
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="gain on held-out contexts, nats a token", title=f"Support size, at {ratio:.0%}")
        axes.legend()
        save(drawn, own, path)
