"""All selection rules side by side on a run's rollouts: tables, a picture, and what each keeps of a few responses.

    python tools/compare_selectors.py runs/quickstart

The student is that of the run before its first step, which wrote step 1's rollouts. For rollouts of a later step, give
that step's weights with --student.

Memory is that of both models in one process, and of one chunk of logits. On a CPU both are float32 by default;
--set teacher.dtype=bfloat16 halves the teacher's part.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from workers import run_in_workers

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.files import atomic_write_bytes
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import destroy_distributed, init_distributed
from megatron_tip.parallel.environment import available_threads
from megatron_tip.planning.plan import plan_run
from megatron_tip.records import TokenIndex
from megatron_tip.rollout.storage import read_rollouts, rollout_file
from megatron_tip.selection import RuleComparison, compare_rules
from megatron_tip.selection.metrics import QUADRANTS
from megatron_tip.training.setup import build_run

Scope = Literal["batch", "rollout"]


@dataclass(frozen=True)
class KeptTokens:
    """One response: its `tokens` as text, and `kept`, `[rules, tokens]` bool."""

    rollout: int
    tokens: list[str]
    kept: np.ndarray


def main(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    rollouts: Annotated[Path | None, typer.Option(help="Another file of rollouts. Default: step 1 of the run.")] = None,
    student: Annotated[Path | None, typer.Option(help="Hugging Face directory of the student that wrote them.")] = None,
    retention_ratio: Annotated[float | None, typer.Option(help="Budget. Default: that of the run.")] = None,
    scope: Annotated[Scope, typer.Option(help="What the budget is a share of, for every rule.")] = "batch",
    responses: Annotated[int, typer.Option(min=0, help="Responses whose kept tokens are shown.")] = 3,
    picture: Annotated[Path | None, typer.Option(help="Default: selectors.png in the run's folder.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value instead of the run's.")] = None,
) -> None:
    """Compare all selection rules on the rollouts of a run."""
    folder = RunFolder(run)
    source = rollouts or rollout_file(folder.rollouts, "step_000001")

    def work() -> None:
        config = config_of(folder, student, changes or ())
        comparison, index, texts = compare(config, source, retention_ratio or config.selection.retention_ratio, scope)
        kept = kept_tokens(comparison, index, texts, responses)
        print_tables(comparison, kept)
        write_picture(comparison, kept, picture or run / "selectors.png")

    run_in_workers(lambda: (config_of(folder, student, changes or ()), read_rollouts(source)), work, 1)


def config_of(folder: RunFolder, student: Path | None, changes: Sequence[str]) -> Config:
    """Returns the run's configuration for a single process, without an engine that generates."""
    overrides = [f"{model}.{kind}_parallel_size=1" for model in ("model", "teacher") for kind in ("tensor", "pipeline")]
    overrides += ["model.sequence_parallel=false", "rollout.engine=replay"]
    overrides += [f"rollout.replay_folder={folder.rollouts}", f"run.folder={folder.path / 'nothing_is_written'}"]
    if student is not None:
        overrides += [f"model.path={student}", "model.drop_layers=[]"]
    return load_config(folder.config, [*overrides, *changes])


def compare(
    config: Config, source: Path, retention_ratio: float, scope: Scope
) -> tuple[RuleComparison, TokenIndex, dict[int, list[str]]]:
    """Scores the rollouts; returns the comparison, the place of its rows, and each response's tokens as text."""
    worker = init_distributed()
    plan = plan_run(config, worker.world_size, reads_prompts=False, generates=False)
    timer, num_threads = PhaseTimer(worker.device), available_threads()
    run = build_run(config, plan, worker, timer, num_threads=num_threads, generates=False)
    rollouts = read_rollouts(source)
    batch = run.batch_of(rollouts)
    statistics, _ = run.teacher.score(run.student, batch, run.teacher.ask(batch))
    assert statistics is not None, "a single process is its own last stage"
    index = batch.token_index(0)
    comparison = compare_rules(statistics, index, retention_ratio=retention_ratio, scope=scope, seed=config.run.seed)
    texts = {
        place: [str(plan.tokenizer.decode([token])) for token in rollout.response_ids]
        for place, rollout in enumerate(rollouts)
        if rollout.response_ids
    }
    destroy_distributed()
    return comparison, index, texts


def kept_tokens(
    comparison: RuleComparison, index: TokenIndex, texts: dict[int, list[str]], count: int
) -> list[KeptTokens]:
    """Returns what each rule keeps of the first `count` non-empty responses."""
    responses = []
    for place, tokens in list(texts.items())[:count]:
        rows = (index.rollout_index == place).nonzero().flatten()
        kept = torch.zeros(len(comparison.names), len(tokens), dtype=torch.bool)
        kept[:, index.position[rows].cpu()] = comparison.masks[:, rows].cpu()
        responses.append(KeptTokens(place, tokens, kept.numpy()))
    return responses


def print_tables(comparison: RuleComparison, responses: list[KeptTokens]) -> None:
    console = Console(width=260)
    axes = " and ".join(comparison.axes)
    table = Table(title=f"Jaccard overlap in %; quadrants: share of the kept rows, cut at the batch medians of {axes}")
    for title in ("", "rule", "kept", *(name.upper() for name in QUADRANTS[: comparison.quadrants.shape[1]])):
        table.add_column(title, justify="left" if title == "rule" else "right", no_wrap=True)
    for number in range(1, len(comparison.names) + 1):
        table.add_column(str(number), justify="right")
    for number, name in enumerate(comparison.names):
        shares = [f"{share:.0%}" for share in comparison.quadrants[number].tolist()]
        overlaps = [f"{100 * overlap:.0f}" for overlap in comparison.jaccard[number].tolist()]
        table.add_row(str(number + 1), name, str(int(comparison.num_selected[number])), *shares, *overlaps)
    console.print(table)
    for response in responses:
        table = Table(title=f"Rollout {response.rollout}: {''.join(response.tokens)!r}", show_lines=False)
        table.add_column("rule")
        table.add_column("kept tokens, with their positions")
        for name, kept in zip(comparison.names, response.kept, strict=True):
            table.add_row(name, "  ".join(f"{place}:{response.tokens[place]!r}" for place in np.flatnonzero(kept)))
        console.print(table, markup=False)


def write_picture(comparison: RuleComparison, responses: list[KeptTokens], path: Path) -> None:
    """Draws overlaps and quadrants on top, then each response: a row per rule, a column per token, dark if kept."""
    num_rules = len(comparison.names)
    heights = [0.26 * num_rules, *[0.2 * num_rules] * len(responses)]
    figure = Figure(figsize=(16, 2 + sum(heights)), layout="constrained")
    top, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    overlaps, quadrants = top.subplots(1, 2, width_ratios=[3, 2])
    image = overlaps.imshow(comparison.jaccard.cpu().numpy(), cmap="viridis", vmin=0, vmax=1)
    overlaps.set_title("Jaccard overlap of the kept tokens", loc="left", fontsize=11)
    overlaps.set_xticks(range(num_rules), [str(number + 1) for number in range(num_rules)], fontsize=7)
    numbered = [f"{name}  {number + 1}" for number, name in enumerate(comparison.names)]
    overlaps.set_yticks(range(num_rules), numbered, fontsize=7)
    top.colorbar(image, ax=overlaps, shrink=0.8)
    draw_quadrants(quadrants, comparison)
    for subfigure, response in zip(below, responses, strict=True):
        draw_response(subfigure.subplots(), response, comparison.names)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    atomic_write_bytes(path, buffer.getvalue())


def draw_quadrants(axes: Axes, comparison: RuleComparison) -> None:
    left = np.zeros(len(comparison.names))
    colours = ("#0072B2", "#56B4E9", "#D55E00", "#BBBBBB")
    for name, colour, shares in zip(QUADRANTS, colours, comparison.quadrants.T.cpu().numpy(), strict=False):
        axes.barh(range(len(left)), shares, left=left, color=colour, label=name.upper())
        left += shares
    axes.set_title(
        "Kept tokens by quadrant, cut at the medians of " + " and ".join(comparison.axes), loc="left", fontsize=9
    )
    axes.set_yticks([])
    axes.invert_yaxis()
    if len(comparison.axes):
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.03))


def draw_response(axes: Axes, response: KeptTokens, names: tuple[str, ...]) -> None:
    axes.imshow(response.kept, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title(f"What each rule keeps of rollout {response.rollout}", loc="left", fontsize=11)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    if len(response.tokens) <= 128:
        # matplotlib would read a dollar sign as mathematics
        labels = [repr(token)[1:-1].replace("$", r"\$") for token in response.tokens]
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)


if __name__ == "__main__":
    typer.run(main)
