"""Which layouts take the first step of a single process: its loss, its gradient norm, its selected tokens.

    python tools/check_layouts.py [--model dense] [--only context_parallel_size] [--processes 4]

Tiny random models in float32, a student and a wider teacher, over gloo on this machine: "dense", with "experts", and
"mixed", a dense student of a teacher with experts. Every layout runs in workers of its own on the same six rollouts,
and a row says how far it is from one process. The command ends with code 1 if a layout differs by more than rounding or
selects other tokens.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' tiny models

from megatron_tip.config import Config
from megatron_tip.records import Rollout
from tests.helpers.distributed import run_workers
from tests.helpers.tiny import make_experts, make_qwen
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, make_rollouts

TOLERANCE = 1e-5
"""Relative difference of loss and gradient norm that the order of float32 sums explains."""
RESPONSE_LENGTHS = [12, 0, 7, 15, 9, 1]


@dataclass(frozen=True)
class Case:
    """A layout of student and teacher by the keys of their sections, as far as they are not 1."""

    world_size: int
    student: dict[str, Any]
    teacher: dict[str, Any]

    def config(self, models: Path) -> Config:
        return make_config(models, Layout(self.world_size), model=dict(self.student), teacher=dict(self.teacher))


TP, PP, CP = "tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size"
EP, EXPERT_TP = "expert_model_parallel_size", "expert_tensor_parallel_size"


def both(world_size: int, **keys: Any) -> Case:
    """Returns the case in which student and teacher have the same layout."""
    return Case(world_size, keys, {key: value for key, value in keys.items() if key != "sequence_parallel"})


DENSE = [
    both(2),
    both(2, **{TP: 2}),
    both(2, **{TP: 2}, sequence_parallel=True),
    both(2, **{PP: 2}),
    both(2, **{CP: 2}),
    both(4, **{TP: 2, PP: 2}),
    both(4, **{TP: 2, CP: 2}),
    both(4, **{TP: 2, CP: 2}, sequence_parallel=True),
    both(4, **{CP: 2}),
    both(4, **{PP: 2, CP: 2}),
    both(4, **{CP: 4}),
    Case(2, {CP: 2}, {}),
    Case(2, {}, {CP: 2}),
    Case(2, {TP: 2}, {CP: 2}),
    Case(4, {CP: 2}, {CP: 4}),
    Case(4, {PP: 2, CP: 2}, {TP: 4}),
]
EXPERTS = [
    both(2),
    both(2, **{EP: 2}),
    both(4, **{EP: 4}),
    both(2, **{TP: 2}, sequence_parallel=True),
    both(2, **{TP: 2, EXPERT_TP: 1}, sequence_parallel=True),
    both(4, **{TP: 2, EP: 2}, sequence_parallel=True),
    both(4, **{TP: 2, EP: 4, EXPERT_TP: 1}, sequence_parallel=True),
    both(2, **{PP: 2}),
    both(4, **{PP: 2, EP: 2}),
    both(4, **{TP: 2, PP: 2, EP: 2, EXPERT_TP: 1}, sequence_parallel=True),
    Case(4, {EP: 2}, {EP: 4}),
    Case(4, {TP: 2, EP: 2, "sequence_parallel": True}, {PP: 2, EP: 2}),
    both(2, **{CP: 2}),
    both(2, **{CP: 2, EP: 2}),
    both(4, **{CP: 2, EP: 4}),
    both(4, **{TP: 2, CP: 2, EP: 2, EXPERT_TP: 1}, sequence_parallel=True),
    both(4, **{PP: 2, CP: 2, EP: 2}),
    Case(4, {CP: 2, EP: 2}, {CP: 4, EP: 4}),
]
MIXED = [
    Case(2, {}, {EP: 2}),
    Case(2, {TP: 2}, {EP: 2}),
    Case(2, {PP: 2}, {TP: 2, EXPERT_TP: 1}),
    Case(4, {TP: 2, PP: 2}, {EP: 4}),
    Case(4, {PP: 2}, {TP: 2, EP: 4, EXPERT_TP: 1}),
    Case(4, {CP: 2}, {PP: 2, EP: 2}),
    Case(4, {CP: 2}, {CP: 4, EP: 2}),
]


def make_expert_models(folder: Path) -> None:
    """Writes a student and a wider teacher with experts; one layer of the student has none."""
    make_experts(folder / "student", seed=1, mlp_only_layers=[1])
    make_experts(folder / "teacher", seed=2, hidden_size=96, tie_word_embeddings=False)


def make_mixed_models(folder: Path) -> None:
    """Writes a dense student and a wider teacher with experts."""
    make_qwen(folder / "student", qk_norm=True, seed=1)
    make_experts(folder / "teacher", seed=2, hidden_size=96, tie_word_embeddings=False)


MODELS: dict[str, tuple[Callable[[Path], Any], list[Case]]] = {
    "dense": (make_models, DENSE),
    "experts": (make_expert_models, EXPERTS),
    "mixed": (make_mixed_models, MIXED),
}
"""Name -> what writes `student` and `teacher` into a folder, and the layouts."""


@dataclass(frozen=True)
class FirstStep:
    """What one rank saw of the first step. `selected`: rollout and position of the tokens that it trained on.

    `layout`: of student and teacher, in words.
    """

    loss: float
    grad_norm: float
    selected: frozenset[tuple[int, int]]
    layout: tuple[str, str]


def first_step(config: Config, rollouts: list[Rollout]) -> FirstStep:
    """Returns the first step of this rank. Runs in a worker."""
    from megatron_tip.training.step import score, select_then_train
    from megatron_tip.training.step_metrics import supervision_metrics

    run = build_tiny_run(config, rollouts)
    batch, groups = run.batch_of(rollouts), run.student.groups
    trained = select_then_train(run, score(run, batch, run.teacher.ask(batch), 1), 1)
    selected: frozenset[tuple[int, int]] = frozenset()
    if trained.selection is not None:
        index, mask = batch.token_index(groups.dp_cp_rank), trained.selection.selection_mask
        columns = (index.rollout_index[mask].tolist(), index.position[mask].tolist())
        selected = frozenset(zip(*columns, strict=True))
    loss = supervision_metrics(groups, trained, pass_seconds=0.0)["train/loss"]
    grad_norm = run.student.apply_gradients(1)["train/grad_norm"]
    grids = (groups.grid, getattr(run.teacher, "groups", groups).grid)
    words = grids[0].in_words() + (", sequence parallel" if config.model.sequence_parallel else "")
    return FirstStep(loss, grad_norm, selected, (words, grids[1].in_words()))


def step_of(case: Case, models: Path, scratch: Path) -> FirstStep:
    """Returns the first step of all ranks of a case together."""
    ranks = run_workers(
        first_step, case.world_size, scratch, case.config(models), make_rollouts(RESPONSE_LENGTHS), timeout_seconds=300
    )
    selected = frozenset().union(*(rank.selected for rank in ranks))
    return FirstStep(ranks[0].loss, ranks[0].grad_norm, selected, ranks[0].layout)


def row_of(name: str, step: FirstStep, single: FirstStep) -> tuple[str, bool]:
    """Returns the row of a step in the table, and whether it is the single process's."""
    gaps = [abs(own / one - 1) for own, one in ((step.loss, single.loss), (step.grad_norm, single.grad_norm))]
    others = len(step.selected ^ single.selected)
    is_same = all(gap <= TOLERANCE for gap in gaps) and not others  # no gap that is NaN
    cells = (name, *step.layout, f"{gaps[0]:.0e}", f"{gaps[1]:.0e}", f"{others}", "same" if is_same else "DIFFERENT")
    return "| " + " | ".join(cells) + " |", is_same


def check(models: Sequence[str], only: str, processes: int, folder: Path) -> bool:
    """Prints the table of all layouts whose name contains `only`; returns whether all are the single process."""
    typer.echo("| Model | Student | Teacher | Loss, relative | Gradient norm, relative | Other tokens | |")
    typer.echo("|---|---|---|---|---|---|---|")
    good = True
    for name in models:
        write, cases = MODELS[name]
        write(folder / name)
        single = step_of(both(1), folder / name, folder)
        for case in cases:
            if case.world_size > processes or only not in f"{case}":
                continue
            row, is_same = row_of(name, step_of(case, folder / name, folder), single)
            typer.echo(row)
            good &= is_same
    return good


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Among {', '.join(MODELS)}; repeatable.")] = None,
    only: Annotated[str, typer.Option(help="Only layouts with this key, such as context_parallel_size.")] = "",
    processes: Annotated[int, typer.Option(min=2, help="No layouts of more processes.")] = 4,
) -> None:
    """Print which layouts take the first step of a single process."""
    with tempfile.TemporaryDirectory(prefix="check_layouts_") as folder:
        if not check(model or list(MODELS), only, processes, Path(folder)):
            raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
