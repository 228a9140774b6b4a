"""How the figures look: one column of print wide or two, safe for colour-blind readers and in grey."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from megatron_tip.observability.run_folder import atomic_write_bytes, atomic_write_text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's; each line also has a marker and a dash of its own."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MAP = "cividis"
LABELS = {
    "h": "entropy H~",
    "d": "divergence D~",
    "c": "compatibility C~",
    "d_l": "learnable $D^L$",
    "d_i": "incompatible $D^I$",
    "h_d": "H~ x D~",
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
    """A figure of so many inches in the common style."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def save(drawn: Figure, data: pd.DataFrame, path: Path, *, index: bool = False) -> None:
    """Writes the picture as `path` (.png) and its data beside it (.csv)."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    atomic_write_bytes(path, buffer.getvalue())
    atomic_write_text(path.with_suffix(".csv"), data.to_csv(index=index, float_format="%.6g"))
