"""One training step over NCCL in several layouts, against one process and float64. The tests' own functions."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.distributed import run_workers
from tests.helpers.first_step import (
    DIFFERENT_BY_LAYOUT,
    ROLLOUTS,
    Observed,
    observe,
    reference_gradients,
)
from tests.helpers.training import Layout, make_config, make_models
from tools.gpu_checks.ranks import RankError, run_ranks
from tools.gpu_checks.task import Task

_ALONE = "one process"
_LAYOUTS = {
    _ALONE: Layout(1),
    "tp 2, sequence parallel": Layout(2, student=(2, 1), sequence_parallel=True),
    "pp 2": Layout(2, student=(1, 2)),
    "dp 2": Layout(2),
}
_TOLERANCE = 1e-4
_MEASURED = ("time/", "perf/", "memory/")


def layouts(task: Task) -> None:
    """Requires the same metrics and the same selected tokens in every layout, and the float64 loss and gradients."""
    folder = make_models(task.folder / "models")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "what is {n} and {n} ?"}}\n' for n in range(4)))
    with ThreadPoolExecutor(task.size(len(_LAYOUTS), 1)) as pool:
        started = {name: pool.submit(_observed, task, folder, name) for name in _LAYOUTS}
    observed = {}
    for name, one in started.items():
        try:
            observed[name] = one.result()
        except RankError as error:  # the other layouts still tell something
            task.require(False, f"{name}: {error}")
    if _ALONE not in observed:
        return
    single, *_ = observed[_ALONE]
    loss, gradients = reference_gradients(folder, ROLLOUTS, single.selected)
    for name, ranks in observed.items():
        _compare(task, name, ranks, single)
        own = sum(rank.loss for rank in ranks)
        task.require(abs(own - loss) <= _TOLERANCE * abs(loss), f"{name}: loss {own}, expected {loss}")
        errors = {
            key: ((ranks[0].gradients[key].double() - wanted).abs().max() / wanted.abs().max()).item()
            for key, wanted in gradients.items()
        }
        worst = max(errors, key=lambda key: errors[key])
        task.note(**{name: {"loss": own, "gradient_error": errors[worst]}})
        task.require(errors[worst] <= _TOLERANCE, f"{name}: gradient of {worst} is off by {errors[worst]:.1e}")


def observed_step(folder: Path, layout: Layout) -> Observed:
    """Returns what this rank sees of the first step, on the CPU."""
    prompts: dict[str, Any] = {"source": "file", "path": folder / "prompts.jsonl", "tasks": ()}
    seen = observe(make_config(folder, layout, prompts=prompts), ROLLOUTS)
    return replace(seen, gradients={name: gradient.cpu() for name, gradient in seen.gradients.items()})


def observed_parts(folder: str, name: str) -> dict[str, Any]:
    """Returns the parts of `observed_step` in the layout of that name."""
    return vars(observed_step(Path(folder), _LAYOUTS[name]))


def _observed(task: Task, folder: Path, name: str) -> list[Observed]:
    layout = _LAYOUTS[name]
    if task.on_gpu:
        place = "tools.gpu_checks.train_step:observed_parts"
        ranks = run_ranks(place, layout.world_size, task, str(folder), name, seconds=70)
        return [Observed(**parts) for parts in ranks]
    # forked after one import of everything, which a fresh process would repeat
    return run_workers(observed_step, layout.world_size, task.folder, folder, layout)


def _compare(task: Task, name: str, ranks: list[Observed], single: Observed) -> None:
    selected = sorted(row for rank in ranks for row in rank.selected)
    task.require(selected == sorted(single.selected), f"{name}: other tokens are selected, or with other weights")
    for rank in ranks:
        for metric, wanted in single.metrics.items():
            if metric in DIFFERENT_BY_LAYOUT or metric.startswith(_MEASURED):
                continue
            value = rank.metrics.get(metric, float("nan"))
            is_same = abs(value - wanted) <= _TOLERANCE * max(abs(wanted), 1e-3)
            task.require(is_same, f"{name}: {metric} is {value}, expected {wanted}")
