"""The rollouts of a run on disk: one JSONL file a batch, one rollout a line.

JSONL and not Parquet: a line can be read by eye, by jq and by any later tool; a damaged one is named by its number;
and Python's shortest decimal form gives every float back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from megatron_tip.errors import InputError
from megatron_tip.files import atomic_write_text, output_errors
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import FINISH_REASONS


def rollout_file(folder: Path, batch_name: str) -> Path:
    """Where the rollouts of a batch lie: `step_000001.jsonl`, `heldout_000000.jsonl`."""
    return folder / f"{batch_name}.jsonl"


def write_rollouts(folder: Path, batch_name: str, rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> None:
    """Writes a batch's rollouts with the texts of their prompts, whole or not at all; makes the folder.

    Raises:
        OutputError: the disk is full or the folder cannot be written to.
    """
    texts = {prompt.index: prompt.text for prompt in prompts}
    lines = [
        json.dumps({**asdict(rollout), "prompt_text": texts[rollout.prompt_index]}, ensure_ascii=False) + "\n"
        for rollout in rollouts
    ]
    path = rollout_file(folder, batch_name)
    with output_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, "".join(lines))


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of one file in its order.

    Raises:
        InputError: no such file, or a line that is broken, cut off or not a rollout; it names file and line.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path}: expected a file of rollouts, cannot read it: {error.strerror}") from error
    return [_rollout(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1)]


def _rollout(where: str, line: bytes) -> Rollout:
    try:
        if not line.endswith(b"\n"):
            raise ValueError("the line has no end: the file was cut off")
        record = json.loads(line)
        _check(record)
    except ValueError as error:
        raise InputError(
            f"{where}: expected a rollout as write_rollouts leaves it, got a broken line: {error}"
        ) from error
    return rollout_of(record)


def rollout_of(record: Mapping[str, Any]) -> Rollout:
    """The rollout whose fields `record` holds as JSON has them."""
    return Rollout(
        prompt_index=record["prompt_index"],
        sample_index=record["sample_index"],
        prompt_ids=tuple(record["prompt_ids"]),
        response_ids=tuple(record["response_ids"]),
        rollout_logprobs=tuple(record["rollout_logprobs"]),
        finish_reason=record["finish_reason"],
        weight_version=record["weight_version"],
        environment_spans=tuple((start, end) for start, end in record.get("environment_spans", [])),
        teacher=record.get("teacher", ""),
    )


def _check(record: Any) -> None:
    """Raises ValueError, saying what is wrong, unless `record` has every field of a Rollout with its type."""
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} instead of an object")
    element_types = {"prompt_ids": int, "response_ids": int, "rollout_logprobs": float}
    scalar_types = {"prompt_index": int, "sample_index": int, "finish_reason": str, "weight_version": int}
    scalar_types |= {"teacher": str}
    record.setdefault("teacher", "")  # files from before there were several have none
    for name, kind in scalar_types.items():
        if type(record.get(name)) is not kind:
            raise ValueError(f"{name} is {record.get(name)!r:.80}, not of type {kind.__name__}")
    for name, kind in element_types.items():
        value = record.get(name)
        if not isinstance(value, list) or any(type(element) is not kind for element in value):
            raise ValueError(f"{name} is {value!r:.80}, not a list of {kind.__name__}")
    if not record["prompt_ids"]:
        raise ValueError("prompt_ids is empty")
    if len(record["rollout_logprobs"]) != len(record["response_ids"]):
        raise ValueError(f"{len(record['rollout_logprobs'])} logprobs for {len(record['response_ids'])} response ids")
    if record["finish_reason"] not in FINISH_REASONS:
        raise ValueError(f"finish_reason is {record['finish_reason']!r}, not one of {FINISH_REASONS}")
    _check_spans(record.get("environment_spans", []), len(record["response_ids"]))


def _check_spans(spans: Any, num_response_tokens: int) -> None:
    """Raises ValueError unless `spans` are ranges in order with generated tokens before, between and behind them."""
    pairs = spans if isinstance(spans, list) else [spans]
    if not all(isinstance(pair, list) and [type(bound) for bound in pair] == [int, int] for pair in pairs):
        raise ValueError(f"environment_spans is {spans!r:.80}, not a list of [start, end]")
    bounds = [0, *chain.from_iterable(pairs), num_response_tokens]
    if pairs and any(left >= right for left, right in pairwise(bounds)):
        raise ValueError(
            f"environment_spans is {spans!r:.80}: expected ranges in order within {num_response_tokens} response ids, "
            "generated ones before, between and behind them"
        )
