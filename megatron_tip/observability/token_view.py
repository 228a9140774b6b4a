"""What a selection looks like to a person: responses with the selected tokens coloured, tokens by quadrant."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

_KEPT, _DROPPED = "#D55E00", "#999999"


@dataclass(frozen=True)
class ViewedResponse:
    """One response. `tokens`: its text, token by token; `selected`: which are supervised; `reverse_kl`: nats a token,
    empty where no rule asked for statistics.
    """

    prompt: str
    tokens: tuple[str, ...]
    selected: tuple[bool, ...]
    reverse_kl: tuple[float, ...] = ()


@dataclass(frozen=True)
class TokenView:
    """A sample of one step's tokens: the first data-parallel replica's.

    `points`: (student entropy, divergence, selected) in nats, of some valid tokens; empty without statistics.
    `divergence`: the name of their second axis. `medians`: of both axes over the whole batch, where the quadrants part.
    `table`: the responses' tokens with all that is known of each, as `token_table.encode_token_table` gives it.
    """

    responses: tuple[ViewedResponse, ...]
    points: tuple[tuple[float, float, bool], ...] = ()
    divergence: str = ""
    medians: tuple[float, float] | None = None
    table: bytes = b""


def response_html(response: ViewedResponse) -> str:
    """Returns the response as HTML: selected tokens on a coloured ground, each token's reverse KL as its tooltip."""
    spans = []
    for place, (token, selected) in enumerate(zip(response.tokens, response.selected, strict=True)):
        title = f"{response.reverse_kl[place]:.3f} nats" if response.reverse_kl else ""
        style = f"background:{_KEPT}55;border-bottom:2px solid {_KEPT}" if selected else ""
        spans.append(f'<span style="{style}" title="{title}">{html.escape(token)}</span>')
    return f'<div style="font-family:monospace;white-space:pre-wrap">{"".join(spans)}</div>'


def page_html(view: TokenView, title: str) -> str:
    """Returns all responses of `view` as one page."""
    parts = [f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><h1>{html.escape(title)}</h1>']
    for response in view.responses:
        share = sum(response.selected) / max(1, len(response.selected))
        parts.append(
            f"<h2>{sum(response.selected)} of {len(response.selected)} tokens selected ({share:.0%})</h2>"
            f'<pre style="color:#666;white-space:pre-wrap">{html.escape(response.prompt)}</pre>'
            f"{response_html(response)}"
        )
    return "\n".join(parts) + "\n"


def quadrant_png(view: TokenView) -> bytes | None:
    """Returns a PNG of the tokens by student entropy and divergence, parted at the medians; None without points."""
    if not view.points:
        return None
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for selected, colour, label in ((False, _DROPPED, "not selected"), (True, _KEPT, "selected")):
        points = [(entropy, divergence) for entropy, divergence, kept in view.points if kept == selected]
        if points:
            axes.scatter(*zip(*points, strict=True), s=6, color=colour, label=label, linewidths=0)
    if view.medians:
        axes.axvline(view.medians[0], color="black", linewidth=0.8)
        axes.axhline(view.medians[1], color="black", linewidth=0.8)
        for name, x, y in (("Q1", 0.98, 0.96), ("Q2", 0.98, 0.02), ("Q3", 0.02, 0.96), ("Q4", 0.02, 0.02)):
            axes.text(x, y, name, transform=axes.transAxes, ha="left" if x < 0.5 else "right")
    axes.set(xlabel="student entropy, nats", ylabel=f"{view.divergence.replace('_', ' ')}, nats")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, markerscale=2)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
