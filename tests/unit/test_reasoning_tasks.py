"""Tasks with worked examples, and their verifier's scores of a run's answers."""

from pathlib import Path

import pytest

from megatron_tip.errors import ConfigError, InputError
from megatron_tip.prompts.reasoning_tasks import Question
from megatron_tip.records import Prompt, Rollout, logprobs, token_ids
from megatron_tip.rollout.storage import write_rollouts
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer
from tools.reasoning_tasks import make_tasks, score_file, summary_of

OPTIONS = {"max_terms": 2}


def test_the_teacher_reads_examples_that_are_no_tasks():
    rows = make_tasks("chain_sum", 20, 3, 1, OPTIONS)
    assert len({row["prompt"] for row in rows}) == 20
    assert rows == make_tasks("chain_sum", 20, 3, 1, OPTIONS)
    for row in rows:
        *worked, last = row["teacher_prompt"]
        assert [turn["role"] for turn in worked] == ["user", "assistant"] * 3
        assert last == {"role": "user", "content": row["prompt"]}
        assert not {turn["content"] for turn in worked[::2]} & {one["prompt"] for one in rows}
    with pytest.raises(InputError, match="different tasks that were found, got 900"):
        make_tasks("chain_sum", 900, 1, 1, {"max_terms": 2, "max_digits": 1})
    with pytest.raises(ConfigError, match="expected options that it takes"):
        make_tasks("chain_sum", 2, 1, 1, {"colour": "red"})


def test_the_tasks_own_verifier_scores_the_answers(tmp_path: Path):
    rows, tokenizer = make_tasks("chain_sum", 2, 1, 1, OPTIONS), make_tiny_tokenizer()
    answers = [rows[0]["entry"]["answer"], "no idea"]
    rollouts = []
    for place, answer in enumerate(answers):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        rollouts.append(Rollout(place, 0, token_ids((1,)), token_ids(ids), logprobs([0.0] * len(ids)), "stop", 0))
    write_rollouts(tmp_path, "heldout_000000", rollouts, [Prompt(place, "", (1,)) for place in range(2)])
    scores = score_file(tmp_path / "heldout_000000.jsonl", rows, tokenizer)
    assert scores[0] == 1.0
    assert scores[1] < 1.0
    assert summary_of("a", scores).startswith("a: 1 of 2 answers right")
    with pytest.raises(InputError, match=r"heldout_000000.jsonl, line 2: expected a prompt among the 1 tasks"):
        score_file(tmp_path / "heldout_000000.jsonl", rows[:1], tokenizer)
    with pytest.raises(InputError, match=r"line 1: the verifier of reasoning-gym's 'chain_sum' fails with KeyError"):
        score_file(tmp_path / "heldout_000000.jsonl", [row | {"entry": {}} for row in rows], tokenizer)


def test_a_verifier_is_the_librarys():
    (row,) = make_tasks("chain_sum", 1, 1, 3, OPTIONS)
    assert Question("chain_sum", OPTIONS, row["entry"]).score(row["entry"]["answer"]) == 1.0
    with pytest.raises(ConfigError, match="expected names of reasoning-gym tasks"):
        Question("chain_sums", OPTIONS, row["entry"]).score("1")
