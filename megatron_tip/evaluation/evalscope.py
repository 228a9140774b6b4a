"""EvalScope, run as a program in its own environment: the same presets with its own data, prompts and scoring."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tip.errors import EvaluationError, InputError, OptionalDependencyError
from megatron_tip.evaluation.child_process import run_logged
from megatron_tip.evaluation.harness import Model, Score
from megatron_tip.evaluation.presets import Preset

MODEL_ID = "student"


def find_evalscope(python: str) -> str:
    """Returns the version of EvalScope in the environment of the interpreter `python`.

    Raises:
        OptionalDependencyError: EvalScope is not installed there.
    """
    command = [python, "-c", "import importlib.metadata as m; print(m.version('evalscope'))"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except OSError as error:
        raise OptionalDependencyError(f"python: cannot run {python}: {error.strerror}") from None
    if found.returncode:
        raise OptionalDependencyError(
            f"eval: expected evalscope in the environment of {python}, which has none; pip install evalscope into an "
            "environment of its own and give its interpreter with --python"
        )
    return found.stdout.strip()


def as_evalscope_scores(preset: Preset) -> Preset:
    """Returns `preset` with the metric and scoring that EvalScope uses instead."""
    return replace(preset, metric="EvalScope's primary", scoring="EvalScope's own prompt and scoring")


def check_preset(preset: Preset) -> None:
    """Raises InputError for a benchmark that we do not run through EvalScope."""
    if not preset.evalscope_dataset:
        raise InputError(
            f"{preset.name}: expected a benchmark without code execution for backend evalscope, which would run the "
            "answers outside our limits; use backend lm-eval"
        )


def evaluate_seed(
    model: Model, preset: Preset, data: Path | None, *, seed: int, limit: int | None, python: str, folder: Path
) -> Score:
    """Runs one benchmark with one seed; keeps EvalScope's own output in `folder`.

    Args:
        data: a local copy of the data set in EvalScope's layout.

    Raises:
        EvaluationError: EvalScope failed, or left no result.
    """
    shutil.rmtree(folder, ignore_errors=True)  # from an earlier evaluation
    folder.mkdir(parents=True)
    chosen = arguments(model, preset, data, seed=seed, limit=limit, folder=folder)
    run_logged([python, "-m", "evalscope.cli.cli", "eval", *chosen], folder / "log.txt")
    found = sorted((folder / "results" / "reports").rglob(f"{preset.evalscope_dataset}.json"))
    if not found:
        raise EvaluationError(f"{folder / 'log.txt'}: EvalScope left no report; its output says why")
    return score_of(json.loads(found[-1].read_text(encoding="utf-8")))


def arguments(
    model: Model, preset: Preset, data: Path | None, *, seed: int, limit: int | None, folder: Path
) -> list[str]:
    """Returns the arguments of `evalscope eval`."""
    sampling: dict[str, Any] = {"temperature": preset.temperature, "max_tokens": preset.max_tokens, "seed": seed}
    sampling |= {"do_sample": True, "top_p": preset.top_p} if preset.temperature > 0 else {"do_sample": False}
    where = ["--model", model.name, "--api-url", model.url] if model.url else ["--model", str(model.path)]
    local = {preset.evalscope_dataset: {"local_path": str(data)}} if data else {}
    return [
        *where,
        *("--model-id", MODEL_ID),
        *("--datasets", preset.evalscope_dataset),
        *(["--dataset-args", json.dumps(local)] if local else []),
        *("--generation-config", json.dumps(sampling)),
        *("--eval-batch-size", str(model.concurrency if model.url else model.batch_size)),
        *("--seed", str(seed)),
        *("--work-dir", str(folder / "results")),
        "--no-timestamp",
        *(["--limit", str(limit)] if limit else []),
    ]


def score_of(report: dict[str, Any]) -> Score:
    """Returns the primary metric of one of EvalScope's reports."""
    try:
        primary = report["primary_metric_identity"]
        (metric,) = (metric for metric in report["metrics"] if metric["identity"] == primary)
        return Score(float(metric["score"]), int(metric["num"]), {"metric": primary["name"]})
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"EvalScope's report: expected one primary metric with score and num, got {sorted(report)}; its format is "
            "that of evalscope 1.14"
        ) from error
