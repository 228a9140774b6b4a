"""Figures about tokens: D^L and D^I over the entropy-KL plane, gain over both, coefficients, gaps, buckets, overlap."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle

from megatron_tip.diagnostics.papers import token_tables
from megatron_tip.diagnostics.papers.evidence import Evidence
from megatron_tip.diagnostics.papers.frames import numbers, rows
from megatron_tip.diagnostics.papers.style import (
    COLOURS,
    DASHES,
    LABELS,
    MAP,
    MARKERS,
    draw_by_support_size,
    figure,
    legend_below,
    save,
)
from megatron_tip.diagnostics.statistics.comparisons import bucket_curve

_BINS = 24
_LEAST_KL = 1e-4


def binned(
    frame: pd.DataFrame, x: str, y: str, values: list[str], x_edges: np.ndarray, y_edges: np.ndarray
) -> pd.DataFrame:
    """Returns the tokens and the means of `values` in each non-empty cell of the plane."""
    cells = frame.assign(
        x_bin=np.clip(np.searchsorted(x_edges, frame[x], side="right") - 1, 0, len(x_edges) - 2),
        y_bin=np.clip(np.searchsorted(y_edges, frame[y], side="right") - 1, 0, len(y_edges) - 2),
    )
    grouped: Any = cells.groupby(["x_bin", "y_bin"])
    found = grouped[values].mean().assign(tokens=grouped.size()).reset_index()
    edges = {"x_low": x_edges[found["x_bin"]], "x_high": x_edges[found["x_bin"] + 1]}
    edges |= {"y_low": y_edges[found["y_bin"]], "y_high": y_edges[found["y_bin"] + 1]}
    return found.assign(**edges)


def draw_cells(axes: Axes, cells: pd.DataFrame, value: str, x_edges: np.ndarray, y_edges: np.ndarray, **options):
    grid = np.full((len(y_edges) - 1, len(x_edges) - 1), np.nan)
    grid[cells["y_bin"], cells["x_bin"]] = cells[value]
    axes.set_facecolor("#EEEEEE")
    return axes.pcolormesh(x_edges, y_edges, np.ma.masked_invalid(grid), cmap=MAP, rasterized=True, **options)


def plane(evidence: Evidence, path: Path) -> None:
    """Draws D^L and D^I over TIP's plane of entropy and reverse KL, with Q3 marked."""
    table = evidence.table(evidence.main_support_size)
    frame = table.frame.assign(kl=np.maximum(table.column("reverse_kl"), _LEAST_KL))
    x_edges = np.linspace(0, max(float(numbers(frame, "entropy").max()), 1e-6), _BINS + 1)
    y_edges = np.geomspace(
        float(numbers(frame, "kl").min()), max(float(numbers(frame, "kl").max()), 2 * _LEAST_KL), _BINS + 1
    )
    cells = binned(frame, "entropy", "kl", ["d_l", "d_i"], x_edges, y_edges)
    entropy, kl = table.medians
    count = int(table.quadrant("q3").sum())
    with figure(7, 2.9) as drawn:
        panels, mesh = drawn.subplots(1, 2, sharey=True), None
        for axes, name in zip(panels, ("d_l", "d_i"), strict=True):
            mesh = draw_cells(axes, cells, name, x_edges, y_edges, norm=PowerNorm(0.5, vmin=0, vmax=1))
            axes.set_yscale("log")
            axes.set_xlabel("student entropy H, nats")
            low = max(kl, _LEAST_KL)
            axes.add_patch(
                Rectangle((0, low), entropy, y_edges[-1] - low, fill=False, edgecolor="#D55E00", linewidth=2)
            )
            axes.set_title(f"{LABELS[name]}, mean; frame: Q3, n = {count}")
        panels[0].set_ylabel("reverse KL, nats")
        assert mesh is not None, "two panels"
        drawn.colorbar(mesh, ax=panels, shrink=0.9, label="mean, on a square-root scale")
        save(drawn, cells, path)


def gain_plane(evidence: Evidence, path: Path) -> None:
    """Draws the mean gain over D^L and D^I together, and by tenth of each."""
    table, (_, resamples) = evidence.table(evidence.main_support_size), evidence.untrained
    edges = np.linspace(0, 1, 11)
    cells = binned(table.frame, "d_l", "d_i", ["gain"], edges, edges)
    cells = cells.query("tokens >= 10")
    curves = [
        bucket_curve(table.column(name), table.column("gain"), resamples).assign(panel="tenths", by=name)
        for name in ("d_l", "d_i")
    ]
    with figure(7, 2.9) as drawn:
        left, right = drawn.subplots(1, 2)
        mesh = draw_cells(left, cells, "gain", edges, edges)
        left.set(xlabel=LABELS["d_l"], ylabel=LABELS["d_i"], title="cells of 10 tokens or more")
        if len(cells):
            left.set(xlim=(0, numbers(cells, "x_high").max()), ylim=(0, numbers(cells, "y_high").max()))
        drawn.colorbar(mesh, ax=left, label="mean gain, nats")
        for place, curve in enumerate(curves):
            draw_curve(right, curve, "value", place, LABELS[curve["by"].iloc[0]])
        right.axhline(0, color="#999999", linewidth=0.8)
        right.set(xlabel="mean of the bucket", ylabel="gain, nats", title="by tenth of each")
        right.legend()
        save(drawn, pd.concat([cells.assign(panel="plane"), *curves], ignore_index=True), path)


def draw_curve(axes: Axes, curve: pd.DataFrame, x: str, place: int, label: str) -> None:
    """Draws a line with its interval, its own colour, marker and dash."""
    colour = COLOURS[place % len(COLOURS)]
    axes.fill_between(curve[x], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        curve[x], curve["gain"], color=colour, marker=MARKERS[place % 7], linestyle=DASHES[place % 7], label=label
    )


def coefficients(evidence: Evidence, path: Path) -> None:
    """Draws the standardised coefficients of the decomposed regression with intervals, for each K."""
    data = token_tables.coefficients(evidence)
    shown = rows(data, model="decomposed")
    with figure(5.2, 3.1) as drawn:
        axes = drawn.subplots()
        draw_by_support_size(axes, shown, "predictor", evidence.support_sizes, value="beta", labels=LABELS)
        axes.set(xlabel="nats of gain per standard deviation", title="What predicts the gain (95 % over prompts)")
        legend_below(drawn, axes, len(evidence.support_sizes))
        save(drawn, data, path)


def proxy_gaps(evidence: Evidence, path: Path) -> None:
    """Draws the gap between high and low support within Q3 by proxy and K, bootstrap and matched."""
    data, sizes = token_tables.proxies(evidence), evidence.support_sizes
    with figure(7, 2.9) as drawn:
        plain, matched = drawn.subplots(1, 2, sharey=True)
        draw_by_support_size(plain, data, "proxy", sizes, value="gap", labels=LABELS)
        bounds = {"low": "matched_low", "high": "matched_high"}
        draw_by_support_size(matched, data, "proxy", sizes, value="matched_gap", labels=LABELS, **bounds)
        plain.set(xlabel="gain gap within Q3, nats", title="high minus low")
        matched.set(xlabel="gain gap within Q3, nats", title="matched by prompt, H, D, position")
        legend_below(drawn, plain, len(sizes))
        save(drawn, data, path)


def buckets(evidence: Evidence, path: Path) -> None:
    """Draws the gain by tenth of each signal, and what entropy and position leave of it."""
    data = token_tables.buckets(evidence)
    with figure(7, 3.1) as drawn:
        panels = drawn.subplots(1, 2)
        for axes, outcome, title in zip(
            panels, ("gain", "residual"), ("gain", "gain without H, position, teacher entropy"), strict=True
        ):
            for place, name in enumerate(token_tables.CURVES):
                own = rows(data, by=name, outcome=outcome)
                draw_curve(axes, own, "bucket", place, LABELS[name])
            axes.axhline(0, color="#999999", linewidth=0.8)
            axes.set(xlabel="tenth of the tokens, from low to high", title=f"{title}, nats")
        legend_below(drawn, panels[0], len(token_tables.CURVES))
        save(drawn, data, path)


def overlaps(evidence: Evidence, path: Path) -> None:
    """Draws the Jaccard overlap of the tokens that the rules keep at the main budget."""
    data = token_tables.overlaps(evidence)
    with figure(7, 5.6) as drawn:
        axes = drawn.subplots()
        image = axes.imshow(data.to_numpy(), cmap=MAP, vmin=0, vmax=1)
        axes.set_xticks(range(len(data)), [str(number) for number in range(1, len(data) + 1)], fontsize=6)
        axes.set_yticks(
            range(len(data)), [f"{name}  {number}" for number, name in enumerate(data.index, 1)], fontsize=6
        )
        axes.set_title(f"Jaccard overlap of the tokens kept at {100 * evidence.main_ratio:g} %")
        drawn.colorbar(image, ax=axes, shrink=0.8)
        save(drawn, data, path, index=True)


FIGURES = {
    "plane": plane,
    "gain_plane": gain_plane,
    "coefficients": coefficients,
    "proxy_gaps": proxy_gaps,
    "buckets": buckets,
    "overlaps": overlaps,
}
