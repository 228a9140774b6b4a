"""Evaluation on several benchmarks with several seeds, one line per benchmark in the run's folder."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_tip.errors import InputError
from megatron_tip.evaluation import evalscope, harness
from megatron_tip.evaluation.code_execution import check_user
from megatron_tip.evaluation.context import context_of, fitted
from megatron_tip.evaluation.harness import Model, Score
from megatron_tip.evaluation.offline_data import find_data
from megatron_tip.evaluation.presets import Preset
from megatron_tip.evaluation.results import append_result, result_of
from megatron_tip.observability.run_folder import RunFolder

logger = logging.getLogger(__name__)

Backend = Literal["lm-eval", "evalscope"]
SeedRunner = Callable[[int, Path], Score]


@dataclass(frozen=True)
class Request:
    """A requested evaluation.

    `label`: names the model in the results. `python`: the interpreter that has the backend. `data`: a folder of
    questions; None: from the hub. `limit`: the number of questions; None: all.
    """

    model: Model
    label: str
    presets: Sequence[Preset]
    seeds: Sequence[int]
    backend: Backend
    python: str
    data: Path | None
    limit: int | None
    allow_code_execution: bool
    allow_code_execution_as_root: bool


def run_benchmarks(request: Request, run: Path) -> list[dict[str, Any]]:
    """Runs all benchmarks in turn, appending each to `run`/eval.jsonl as it ends; returns the lines.

    Raises:
        InputError, OptionalDependencyError: before anything runs. EvaluationError: a backend failed; earlier results
            are kept.
    """
    if not run.is_dir():
        raise InputError(f"{run}: expected the folder of a run, got no such folder")
    if not request.seeds or len(set(request.seeds)) != len(request.seeds):
        raise InputError(f"seeds: expected at least one, none twice, got {list(request.seeds)}")
    for preset in request.presets:
        if preset.executes_code and not request.allow_code_execution:
            raise InputError(
                f"{preset.name}: runs programs that the model writes, on this machine as this user: allow it with "
                "--allow-code-execution, best in a container, or leave the benchmark out"
            )
    if any(preset.executes_code for preset in request.presets):
        check_user(allow_root=request.allow_code_execution_as_root)
    context = context_of(request.model)
    request = replace(request, presets=[fitted(preset, context) for preset in request.presets])
    prepare = _prepare_harness if request.backend == "lm-eval" else _prepare_evalscope
    runners, version = prepare(request)
    results = []
    for preset, runner in zip(request.presets, runners, strict=True):
        base = run / "eval" / re.sub(r"[^\w.-]+", "_", request.label) / request.backend / preset.name
        scores = []
        for seed in request.seeds:
            scores.append(runner(seed, base / f"seed_{seed}"))
            logger.info("%s, seed %d: %.1f %%", preset.name, seed, 100 * scores[-1].value)
        facts = {
            "model": request.label,
            "backend": f"{request.backend} {version}",
            "data": str(request.data) if request.data else "hub",
            "limit": request.limit,
        }
        used = evalscope.as_evalscope_scores(preset) if request.backend == "evalscope" else preset
        results.append(result_of(used, request.seeds, scores, facts))
        append_result(RunFolder(run), results[-1])
    return results


def _prepare_harness(request: Request) -> tuple[list[SeedRunner], str]:
    """Checks everything that the harness will need; returns each preset's runner and the harness's version."""
    found = harness.find_harness(request.python)
    files = [find_data(request.data, preset) if request.data else None for preset in request.presets]

    def runner(preset: Preset, place: int) -> SeedRunner:
        return lambda seed, folder: harness.evaluate_seed(
            request.model, preset, files[place], seed=seed, limit=request.limit, harness=found, folder=folder
        )

    return [runner(preset, place) for place, preset in enumerate(request.presets)], found.version


def _prepare_evalscope(request: Request) -> tuple[list[SeedRunner], str]:
    for preset in request.presets:
        evalscope.check_preset(preset)
        if request.data and not (request.data / preset.name).exists():
            raise InputError(f"data: expected a copy of the data set in {request.data / preset.name}, got none")
    version = evalscope.find_evalscope(request.python)

    def runner(preset: Preset) -> SeedRunner:
        data = request.data / preset.name if request.data else None
        return lambda seed, folder: evalscope.evaluate_seed(
            request.model, preset, data, seed=seed, limit=request.limit, python=request.python, folder=folder
        )

    return [runner(preset) for preset in request.presets], version
