"""The rollouts of a run on disk: one JSONL file per batch, one rollout per line.

JSONL rather than Parquet: people, jq and any later tool can read it, errors can name a damaged line by its number, and
Python's shortest decimal form restores every float bit for bit.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_tip.errors import InputError
from megatron_tip.files import atomic_write_text, output_errors, parse_json
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.codec import rollout_from_record, rollout_to_record


def rollout_file(folder: Path, batch_name: str) -> Path:
    """Returns the file of a batch's rollouts: `step_000001.jsonl`, `heldout_000000.jsonl`."""
    return folder / f"{batch_name}.jsonl"


def write_rollouts(folder: Path, batch_name: str, rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> None:
    """Writes a batch's rollouts and the texts of their prompts atomically; creates the folder.

    Raises:
        OutputError: the disk is full or the folder is not writable.
    """
    texts = {prompt.index: prompt.text for prompt in prompts}
    lines = [
        json.dumps({**rollout_to_record(rollout), "prompt_text": texts[rollout.prompt_index]}, ensure_ascii=False)
        + "\n"
        for rollout in rollouts
    ]
    path = rollout_file(folder, batch_name)
    with output_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, "".join(lines))


def read_rollouts(path: Path) -> list[Rollout]:
    """Returns the rollouts of one file, in order.

    Raises:
        InputError: there is no such file, or a line is broken, cut off or not a rollout; names file and line.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path}: expected a file of rollouts, cannot read it: {error.strerror}") from error
    return [_rollout(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1)]


def _rollout(where: str, line: bytes) -> Rollout:
    try:
        if not line.endswith(b"\n"):
            raise ValueError("the line has no newline: the file was cut off")
        return rollout_from_record(parse_json(line))
    except ValueError as error:
        raise InputError(
            f"{where}: expected a rollout as written by write_rollouts, got a broken line: {error}"
        ) from error
