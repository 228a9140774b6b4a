"""The figures' common style: one or two print columns wide, readable for colour-blind readers and in grey."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tip.diagnostics.papers.frames import errors, in_order, rows
from megatron_tip.files import atomic_write_bytes, atomic_write_text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours; each line also has its own marker and dash."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MAP = "cividis"
LABELS = {
    "h": r"entropy $\tilde{H}$",
    "d": r"divergence $\tilde{D}$",
    "c": r"compatibility $\tilde{C}$",
    "d_l": "learnable $D^L$",
    "d_i": "incompatible $D^I$",
    "h_d": r"$\tilde{H} \times \tilde{D}$",
    "position": "position",
    "teacher_entropy": "teacher entropy",
    "compatibility": "C mass",
    "cbc": "CBC",
    "jaccard": "Jaccard",
    "overlap": "overlap",
    "shared_mass": "shared mass",
}

_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
}


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """Yields a figure of `width` x `height` inches in the common style."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def draw_by_support_size(
    axes: Axes,
    data: pd.DataFrame,
    key: str,
    sizes: list[int],
    *,
    value: str,
    low: str = "low",
    high: str = "high",
    labels: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Draws a line for each name in the column `key`, top to bottom, with a mark and its interval for each of its K.

    Args:
        labels: by name; a name without one is its own label.
    """
    names = list(dict.fromkeys(data[key]))
    for place, size in enumerate(sizes):
        own = in_order(rows(data, k=size), key, names)
        axes.errorbar(
            own[value],
            np.arange(len(names)) + 0.22 * (place - (len(sizes) - 1) / 2),
            xerr=errors(own, value, low, high),
            fmt=MARKERS[place % 7],
            color=COLOURS[place % 7],
            label=f"K = {size}",
            capsize=2,
        )
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(names)), [labels.get(name, name) for name in names])
    if not axes.yaxis_inverted():
        axes.invert_yaxis()


def legend_below(drawn: Figure, axes: Axes, columns: int) -> None:
    """Draws the legend of `axes` below the whole figure, where it hides nothing."""
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def save(drawn: Figure, data: pd.DataFrame, path: Path, *, index: bool = False) -> None:
    """Writes the picture as `path` (.png) and its data beside it (.csv)."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    atomic_write_bytes(path, buffer.getvalue(), setting="--out")
    atomic_write_text(path.with_suffix(".csv"), data.to_csv(index=index, float_format="%.6g"), setting="--out")
