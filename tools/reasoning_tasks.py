"""Tasks of reasoning-gym as prompts, with worked examples for the teacher, and the score of a run's answers to them.

    python tools/reasoning_tasks.py make chain_sum tasks.jsonl --num 400 --options '{"max_terms": 2}'
    python tools/reasoning_tasks.py score runs/mine tasks.jsonl

`make` writes one task per line: `prompt`, what the student reads; `teacher_prompt`, the same after worked examples, as
chat messages (prompts.teacher_prompt_field); and what the verifier needs. `score` gives the responses that a run has
saved of its held-out prompts, before and after training, to the task's own verifier.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_tip.config.io import load_config
from megatron_tip.errors import InputError, MegatronTipError
from megatron_tip.files import atomic_write_text, parse_json
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.prompts.reasoning_tasks import Question, generate_questions
from megatron_tip.rollout.storage import read_rollouts


def make_tasks(
    task: str, num_tasks: int, num_examples: int, seed: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns `num_tasks` different tasks; the worked examples of the teacher's prompts are tasks of their own."""
    entries: dict[str, dict[str, Any]] = {}
    for question in generate_questions([task], 4 * num_tasks + num_examples, seed, options):
        entries.setdefault(question.text, dict(question.entry))
    examples, rest = list(entries.values())[:num_examples], list(entries.values())[num_examples:]
    if len(rest) < num_tasks:
        raise InputError(f"--num: expected at most the {len(rest)} different tasks that were found, got {num_tasks}")
    worked = [turn for one in examples for turn in (_turn("user", one["question"]), _turn("assistant", one["answer"]))]
    return [
        {
            "prompt": entry["question"],
            "teacher_prompt": [*worked, _turn("user", entry["question"])],
            "task": task,
            "options": options,
            "entry": entry,
        }
        for entry in rest[:num_tasks]
    ]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def score_file(path: Path, tasks: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """Returns the verifier's score of each response in a file of rollouts.

    Raises:
        InputError: a rollout is of no task in `tasks`, or the verifier fails; names the file and the line.
    """
    scores = []
    for number, rollout in enumerate(read_rollouts(path), start=1):
        if not 0 <= rollout.prompt_index < len(tasks):
            raise InputError(
                f"{path}, line {number}: expected a prompt among the {len(tasks)} tasks, got {rollout.prompt_index}"
            )
        task = tasks[rollout.prompt_index]
        answer = str(tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True)).strip()
        try:
            scores.append(Question(task["task"], task["options"], task["entry"]).score(answer))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    return scores


def summary_of(name: str, scores: Sequence[float]) -> str:
    """Returns a line about the scores of one batch."""
    right = sum(score == 1.0 for score in scores)
    return f"{name}: {right} of {len(scores)} answers right, mean score {sum(scores) / max(1, len(scores)):.3f}"


app = typer.Typer(add_completion=False)


@app.command()
def make(
    task: Annotated[str, typer.Argument(help="Name of a reasoning-gym task.")],
    path: Annotated[Path, typer.Argument(help="File to write, .jsonl.")],
    num: Annotated[int, typer.Option(min=1, help="Tasks.")] = 400,
    examples: Annotated[int, typer.Option(min=0, help="Worked examples in the teacher's prompt.")] = 4,
    seed: Annotated[int, typer.Option()] = 1,
    options: Annotated[str, typer.Option(help="Options of the task, as JSON.")] = "{}",
) -> None:
    """Writes tasks."""
    try:
        rows = make_tasks(task, num, examples, seed, parse_json(options))
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows), setting="PATH")
    except (MegatronTipError, ValueError) as error:
        sys.exit(f"error: {error}")


@app.command()
def score(
    run: Annotated[Path, typer.Argument(help="Folder of a run with output.save_rollouts.")],
    path: Annotated[Path, typer.Argument(help="The tasks.")],
) -> None:
    """Scores a run's answers to its held-out tasks."""
    folder = RunFolder(run)
    try:
        tasks = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        tokenizer = AutoTokenizer.from_pretrained(load_config(folder.config).model.path, local_files_only=True)
        found = sorted(folder.rollouts.glob("heldout_*.jsonl"))
        if not found:
            raise InputError(f"{folder.rollouts}: expected heldout_*.jsonl, found none; set output.save_rollouts")
        for batch in found:
            typer.echo(summary_of(batch.stem, score_file(batch, tasks, tokenizer)))
    except (MegatronTipError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app()
