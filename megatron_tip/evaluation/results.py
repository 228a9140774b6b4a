"""eval.jsonl in a run's folder: one line per benchmark, with mean and standard deviation over seeds."""

import errno
import fcntl
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tip.errors import InputError
from megatron_tip.evaluation.harness import Score
from megatron_tip.evaluation.presets import Preset
from megatron_tip.files import output_errors
from megatron_tip.observability.run_folder import RunFolder


def result_of(
    preset: Preset, seeds: Sequence[int], scores: Sequence[Score], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the line of one benchmark. `sd`: of the sample (n - 1); None for a single seed.

    Args:
        facts: what was evaluated, and how: `model`, `backend`, `data`, `limit`.
    """
    cut = {"max_tokens asked": preset.max_tokens_asked} if preset.max_tokens_asked else {}
    values = [score.value for score in scores]
    return {
        "benchmark": preset.name,
        "metric": preset.metric,
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "num_seeds": len(seeds),
        "num_questions": scores[0].num_questions,
        "seeds": list(seeds),
        "values": values,
        **facts,
        "protocol": {
            "temperature": preset.temperature,
            "top_p": preset.top_p,
            "max_tokens": preset.max_tokens,
            **cut,
            "context": preset.context or "not known",
            "samples a question and seed": 1,
            "scoring": preset.scoring,
        },
        "details": [dict(score.facts) for score in scores if score.facts],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def append_result(folder: RunFolder, result: Mapping[str, Any]) -> None:
    """Appends a line to eval.jsonl atomically; evaluations that end at the same time wait for each other.

    Raises:
        OutputError: the file cannot be written.
    """
    line = (json.dumps(result, ensure_ascii=False) + "\n").encode()
    path = folder.evaluations
    # Unbuffered: a line that does not fit is truncated away here, and nothing of it is written at the close.
    with output_errors(path), path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.seek(0, os.SEEK_END)
        if before:
            file.seek(before - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line  # after an unfinished line
        try:
            if (written := file.write(line)) != len(line):
                raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes fit")
            os.fsync(file)
        except OSError:
            file.truncate(before)
            raise


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns the results as lines for a terminal, in percent."""
    lines = []
    for result in results:
        spread = "" if result["sd"] is None else f" ± {100 * result['sd']:.1f}"
        score = f"{100 * result['mean']:.1f}{spread}"
        lines.append(
            f"{result['benchmark']:14} {score:>14}   {result['num_seeds']} seeds x {result['num_questions']} questions"
        )
    return "\n".join(lines)


def model_folder(run: Path, model: Path | None) -> Path:
    """Returns the Hugging Face directory to evaluate: `model`, else the student exported by the run.

    Raises:
        InputError: it is not such a directory.
    """
    path = model or RunFolder(run).hf
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: expected a Hugging Face directory with a config.json, got none; a run writes its student there "
            "with output.export_hf, or give one with --model"
        )
    return path
