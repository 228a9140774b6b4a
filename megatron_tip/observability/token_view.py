"""Views for people: responses with the selected tokens coloured, and tokens by quadrant."""

import html
import io

import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from megatron_tip.observability.token_table import TokenTable

_KEPT, _DROPPED = "#D55E00", "#999999"


def response_html(tokens: pa.Table) -> str:
    """Returns a response as HTML: selected tokens on a coloured background, each token's reverse KL as tooltip."""
    spans = []
    columns = (tokens.column(name).to_pylist() for name in ("text", "selected", "reverse_kl"))
    for text, selected, reverse_kl in zip(*columns, strict=True):
        title = f"{reverse_kl:.3f} nats" if reverse_kl is not None else ""
        style = f"background:{_KEPT}55;border-bottom:2px solid {_KEPT}" if selected else ""
        spans.append(f'<span style="{style}" title="{title}">{html.escape(text)}</span>')
    return f'<div style="font-family:monospace;white-space:pre-wrap">{"".join(spans)}</div>'


def num_selected(tokens: pa.Table) -> int:
    """Returns the number of selected tokens."""
    return sum(tokens.column("selected").to_pylist())


def page_html(view: TokenTable, title: str) -> str:
    """Returns all responses of `view` as one page."""
    parts = [f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><h1>{html.escape(title)}</h1>']
    for viewed in view.facts.rollouts:
        tokens = view.tokens_of(viewed)
        share = num_selected(tokens) / max(1, len(tokens))
        parts.append(
            f"<h2>{num_selected(tokens)} of {len(tokens)} tokens selected ({share:.0%})</h2>"
            f'<pre style="color:#666;white-space:pre-wrap">{html.escape(viewed.prompt)}</pre>'
            f"{response_html(tokens)}"
        )
    return "\n".join(parts) + "\n"


def quadrant_png(view: TokenTable) -> bytes | None:
    """Returns a PNG of the tokens by student entropy and divergence, divided at the medians; None without points."""
    facts = view.facts
    if not facts.points:
        return None
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for selected, colour, label in ((False, _DROPPED, "not selected"), (True, _KEPT, "selected")):
        points = [(entropy, divergence) for entropy, divergence, kept in facts.points if kept == selected]
        if points:
            axes.scatter(*zip(*points, strict=True), s=6, color=colour, label=label, linewidths=0)
    if facts.medians:
        axes.axvline(facts.medians[0], color="black", linewidth=0.8)
        axes.axhline(facts.medians[1], color="black", linewidth=0.8)
        for name, x, y in (("Q1", 0.98, 0.96), ("Q2", 0.98, 0.02), ("Q3", 0.02, 0.96), ("Q4", 0.02, 0.02)):
            axes.text(x, y, name, transform=axes.transAxes, ha="left" if x < 0.5 else "right")
    axes.set(xlabel="student entropy, nats", ylabel=f"{facts.divergence.replace('_', ' ')}, nats")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, markerscale=2)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
