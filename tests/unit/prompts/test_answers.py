"""The right answers of a file's rows, which held-out responses are compared with."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_tip.errors import InputError
from megatron_tip.prompts.files import read_prompt_file
from tests.helpers.prompt_files import load, write_both, write_lines


def test_held_out_prompts_have_the_right_answers_of_their_rows(tmp_path):
    rows = [
        {"prompt": text, "answer": answer} for text, answer in zip("abcd", ["1", "2", "#### 3", "4.0"], strict=True)
    ]
    for path in write_both(tmp_path, rows):
        source = load(2, path=path, answer_field="answer", verify="last_number")
        assert {i: question.score("3") for i, question in source.heldout_questions.items()} == {2: 1.0, 3: 0.0}
        assert load(2, path=path, answer_field="answer").heldout_questions == {}
    numbers = write_lines(tmp_path, *(json.dumps({"prompt": text, "answer": i}) for i, text in enumerate("abc")))
    (question,) = load(1, path=numbers, answer_field="answer", verify="whole").heldout_questions.values()
    assert question.score("2") == 1.0


@pytest.mark.parametrize("answer", ["", "  ", None, True, ["4"], {"a": 1}])
def test_an_answer_that_is_none_is_named(tmp_path, answer):
    path = write_lines(
        tmp_path, json.dumps({"prompt": "a", "answer": 1}), json.dumps({"prompt": "b", "answer": answer})
    )
    with pytest.raises(InputError, match=r"line 2: prompts.answer_field: expected 'answer' to be the right answer"):
        load(path=path, answer_field="answer")


def test_a_prompt_has_one_answer(tmp_path):
    rows = [{"prompt": "a", "answer": 5}, {"prompt": "b", "answer": 1e-7}, {"prompt": "a", "answer": "5"}]
    file = read_prompt_file(write_lines(tmp_path, *map(json.dumps, rows)), "prompt", answer_field="answer")
    assert [(row.answer, row.last_index) for row in file.rows] == [("5", 2), ("0.0000001", 1)]
    path = write_lines(tmp_path, *(json.dumps({"prompt": "a", "answer": answer}) for answer in (5, 10**400)))
    with pytest.raises(
        InputError, match=r"expected one answer to each prompt, got '5' in .* line 1 and '10+.* in .*2;"
    ):
        read_prompt_file(path, "prompt", answer_field="answer")


def test_answers_that_cannot_be_compared_are_refused(tmp_path):
    path = write_lines(tmp_path, *(json.dumps({"prompt": text, "answer": "Paris"}) for text in "ab"))
    with pytest.raises(
        InputError, match=r'line 2: expected an answer with a number, with heldout.verify = "last_number"'
    ):
        load(1, path=path, answer_field="answer", verify="last_number")
    empty = write_lines(tmp_path, *(json.dumps({"prompt": text, "answer": "."}) for text in "ab"))
    with pytest.raises(InputError, match=r"line 2: expected an answer with a text, with heldout.verify"):
        load(1, path=empty, answer_field="answer", verify="whole")
    with pytest.raises(InputError, match=r"prompts.answer_field: expected a field of .*, got 'solution'"):
        load(1, path=path, answer_field="solution", verify="whole")


def test_a_parquet_column_of_answers_may_be_of_numbers_but_not_of_nan(tmp_path):
    path = tmp_path / "p.parquet"
    rows = [{"prompt": text, "answer": value} for text, value in (("a", 1.5), ("b", 2.0))]
    pq.write_table(pa.Table.from_pylist(rows), path)
    (question,) = load(1, path=path, answer_field="answer", verify="whole").heldout_questions.values()
    assert (question.score("2"), question.score("2.5")) == (1.0, 0.0)
    pq.write_table(pa.Table.from_pylist([*rows, {"prompt": "c", "answer": float("nan")}]), path)
    with pytest.raises(
        InputError, match=r"row 3: prompts.answer_field: expected 'answer' to be the right answer, .*, got nan"
    ):
        load(path=path, answer_field="answer")
