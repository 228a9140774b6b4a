"""lm-evaluation-harness, run as a program in its own environment and never imported here."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tip.errors import EvaluationError, OptionalDependencyError
from megatron_tip.evaluation.child_process import run_logged
from megatron_tip.evaluation.code_execution import execute, program_of
from megatron_tip.evaluation.offline_data import OfflineData
from megatron_tip.evaluation.presets import Preset
from megatron_tip.files import atomic_write_text

TASK_PREFIX = "megatron_tip_"
_STOP = ["</s>", "<|im_end|>", "<|eot_id|>"]


@dataclass(frozen=True)
class Model:
    """The evaluated model: a Hugging Face directory or, with `url`, the model `name` of an OpenAI-compatible server.

    `url` ends with /v1. `device`: "" lets the backend choose.
    """

    path: Path | None = None
    url: str = ""
    name: str = ""
    device: str = ""
    batch_size: int = 8
    concurrency: int = 32


@dataclass(frozen=True)
class Score:
    """One seed's score: `value` in [0, 1], the mean over `num_questions`; `facts`: what else to record."""

    value: float
    num_questions: int
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Harness:
    """The installed harness: its interpreter, its version, the folder of its tasks."""

    python: str
    version: str
    tasks: Path


def find_harness(python: str) -> Harness:
    """Returns the harness in the environment of the interpreter `python`.

    Raises:
        OptionalDependencyError: lm-eval is not installed there.
    """
    program = (
        "import importlib.metadata as m, importlib.util as u; print(m.version('lm_eval')); "
        "print(u.find_spec('lm_eval').submodule_search_locations[0])"
    )
    try:
        found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    except OSError as error:
        raise OptionalDependencyError(f"python: cannot run {python}: {error.strerror}") from None
    if found.returncode:
        raise OptionalDependencyError(
            f"eval: expected lm-eval in the environment of {python}, which has none; `make eval` makes an environment "
            'for it (give its interpreter with --python), or pip install "megatron_tip[eval]"'
        )
    version, folder = found.stdout.split("\n")[:2]
    return Harness(python, version, Path(folder) / "tasks")


def evaluate_seed(
    model: Model,
    preset: Preset,
    data: OfflineData | None,
    *,
    seed: int,
    limit: int | None,
    harness: Harness,
    folder: Path,
) -> Score:
    """Runs one benchmark with one seed; keeps the harness's own output in `folder`.

    Raises:
        EvaluationError: the harness failed, or left no result.
    """
    shutil.rmtree(folder, ignore_errors=True)  # from an earlier evaluation
    folder.mkdir(parents=True)
    write_task(folder / "task", preset, data, harness)
    command = [harness.python, "-m", "lm_eval", "run", *arguments(model, preset, seed=seed, limit=limit, folder=folder)]
    run_logged(command, folder / "log.txt")
    return _executed(preset, folder) if preset.executes_code else _scored(preset, folder)


def write_task(folder: Path, preset: Preset, data: OfflineData | None, harness: Harness) -> None:
    """Writes the harness's task for `preset` with our prompt, sampling and data, as JSON, which is valid YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    task: dict[str, Any] = {
        "task": TASK_PREFIX + preset.name,
        "doc_to_text": preset.prompt,
        "num_fewshot": 0,
        "repeats": 1,
        "generation_kwargs": {
            "until": _STOP,
            "do_sample": preset.temperature > 0,
            "temperature": preset.temperature,
            "max_gen_toks": preset.max_tokens,
            **({"top_p": preset.top_p} if preset.temperature > 0 else {}),
        },
    }
    if preset.executes_code:  # the harness's own task would run the answers in its own process
        task |= {
            "dataset_path": "openai/openai_humaneval",
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_target": "",
            "metric_list": [{"metric": "bypass"}],
        }
    if data is not None:
        files = {split: str(data.path) for split in ("train", "validation", "test")}
        task |= {"dataset_path": data.kind, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in task.items()]
    include = [] if preset.executes_code else [f"include: {json.dumps(str(harness.tasks / preset.harness_task))}\n"]
    atomic_write_text(folder / f"{preset.name}.yaml", "".join(include + lines))


def arguments(model: Model, preset: Preset, *, seed: int, limit: int | None, folder: Path) -> list[str]:
    """Returns the arguments of `lm_eval run`."""
    if model.url:
        facts = {"model": model.name, "base_url": f"{model.url.rstrip('/')}/chat/completions", "seed": seed}
        facts |= {"num_concurrent": model.concurrency, "max_retries": 3, "tokenized_requests": False}
        chosen = ["--model", "local-chat-completions"]
    else:
        facts = {"pretrained": str(model.path), "dtype": "auto"}
        chosen = ["--model", "hf", "--batch_size", str(model.batch_size)]
        chosen += ["--device", model.device] if model.device else []
    return [
        *chosen,
        *("--model_args", json.dumps(facts)),
        *("--tasks", TASK_PREFIX + preset.name),
        *("--include_path", str(folder / "task")),
        *("--seed", str(seed)),
        *("--output_path", str(folder / "results")),
        "--apply_chat_template",
        "--log_samples",
        *(["--predict_only"] if preset.executes_code else []),
        *(["--limit", str(limit)] if limit else []),
    ]


def _scored(preset: Preset, folder: Path) -> Score:
    found = sorted((folder / "results").rglob("results_*.json"))
    if not found:
        raise EvaluationError(f"{folder / 'log.txt'}: the harness left no results; its output says why")
    results = json.loads(found[-1].read_text(encoding="utf-8"))
    task = TASK_PREFIX + preset.name
    scores = results["results"][task]
    if preset.metric not in scores:
        raise EvaluationError(f"{found[-1]}: expected the metric {preset.metric!r}, got {sorted(scores)}")
    return Score(float(scores[preset.metric]), int(results["n-samples"][task]["effective"]), {})


def _executed(preset: Preset, folder: Path) -> Score:
    """Runs the programs in the answers that the harness logged."""
    found = sorted((folder / "results").rglob(f"samples_{TASK_PREFIX}{preset.name}_*.jsonl"))
    if not found:
        raise EvaluationError(f"{folder / 'log.txt'}: the harness left no answers; its output says why")
    samples = [json.loads(line) for line in found[-1].read_text(encoding="utf-8").splitlines()]
    runs = [execute(program_of(sample["resps"][0][0], sample["doc"])) for sample in samples]
    outcomes = {name: sum(run.outcome == name for run in runs) for name in ("passed", "failed", "timeout")}
    facts = {"outcomes": outcomes, "network_cut_off": all(run.network_cut_off for run in runs)}
    return Score(outcomes["passed"] / max(1, len(runs)), len(runs), facts)
