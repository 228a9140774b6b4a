"""Answers to held-out questions, as the tasks' own verifiers score them."""

import logging

import pytest

from megatron_tip.errors import ConfigError
from megatron_tip.prompts.reasoning_tasks import Question, check_tasks, generate_questions
from megatron_tip.prompts.verifier import ACCURACY, SCORE, AnswerPart, ExpectedAnswer, Verifier, answer_in
from megatron_tip.records import Rollout, logprobs, token_ids
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

OPTIONS = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
TOKENIZER = make_tiny_tokenizer()


def answered(place: int, text: str) -> Rollout:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return Rollout(place, 0, token_ids((1,)), token_ids(ids), logprobs([0.0] * len(ids)), "stop", 0)


@pytest.mark.parametrize(
    "text,part,answer",
    [
        (" 12 \n", "whole", "12"),
        ("5 - 7 = -2.", "last_number", "-2"),
        ("It is 1,204, I think", "last_number", "1204"),
        ("about 2.50 of 3.", "last_number", "3"),
        ("5-3", "last_number", "3"),
        ("x=-3", "last_number", "-3"),
        ("1, 2,3", "last_number", "3"),
        ("1,2345", "last_number", "2345"),
        ("\u22125", "last_number", "-5"),
        ("-$5", "last_number", "-5"),
        ("it is .5", "last_number", ".5"),
        ("1e-7", "last_number", "1e-7"),
        ("none", "last_number", ""),
    ],
)
def test_the_answer_is_the_response_or_its_last_number(text: str, part: AnswerPart, answer: str):
    assert answer_in(text, part) == answer


@pytest.mark.parametrize("part,accuracy", [("whole", 0.25), ("last_number", 0.5)])
def test_right_answers_are_counted_by_the_tasks_verifier(part: AnswerPart, accuracy: float):
    questions = dict(enumerate(generate_questions(["chain_sum"], 4, 1, OPTIONS), start=10))
    right = [str(question.entry["answer"]) for question in questions.values()]
    texts = [right[0], f"that makes {right[1]}", f"{right[2]} or {int(right[2]) + 1}", ""]
    rollouts = [answered(place, text) for place, text in zip(questions, texts, strict=True)]
    metrics = Verifier(questions, TOKENIZER, part).metrics([*rollouts, answered(3, "of no question")])
    assert metrics[ACCURACY] == accuracy
    assert accuracy <= metrics[SCORE] < 1.0
    assert Verifier(questions, TOKENIZER, part).metrics([answered(3, "of no question")]) == {}


def test_a_verifier_that_fails_scores_0_and_says_so(caplog: pytest.LogCaptureFixture):
    broken = {0: Question("chain_sum", OPTIONS, {"question": "1 + 1"})}
    with caplog.at_level(logging.WARNING):
        metrics = Verifier(broken, TOKENIZER, "whole").metrics([answered(0, "2")])
    assert metrics == {ACCURACY: 0.0, SCORE: 0.0}
    assert "an answer scores 0: the verifier of reasoning-gym's 'chain_sum' fails with KeyError" in caplog.text


def test_options_go_to_every_task_and_are_checked_before_a_run():
    for question in generate_questions(["chain_sum", "basic_arithmetic"], 6, 1, {"max_terms": 2}):
        assert question.entry["metadata"]["num_terms"] == 2
    check_tasks(["chain_sum"], OPTIONS)
    with pytest.raises(ConfigError, match=r"task 'coin_flip': .*\(prompts\.task_options\), got \{'max_terms': 2\}"):
        check_tasks(["chain_sum", "coin_flip"], {"max_terms": 2})
    with pytest.raises(ConfigError, match="max_terms must be >= min_terms"):
        check_tasks(["chain_sum"], {"min_terms": 5, "max_terms": 2})


RIGHT, WRONG = 1.0, 0.0


@pytest.mark.parametrize(
    "part,expected,response,score",
    [
        *(("whole", "Paris", response, RIGHT) for response in ("Paris", " paris. ")),
        *(("whole", "Paris", response, WRONG) for response in ("It is Paris", "Pari", "Paris 7", "")),
        *(("contains", "Paris", response, RIGHT) for response in ("It is Paris!", "PARIS", "(Paris)")),
        *(("contains", "Paris", response, WRONG) for response in ("Parisian", "Pa ris", "")),
        ("contains", "Asuncion", "The capital is Asunci\u00f3n.", RIGHT),
        ("contains", "S\u00e3o Tom\u00e9", "sao  tome", RIGHT),
        ("contains", "Rome", "Romero, then Rome", RIGHT),
        ("contains", "7", "17, 71, 7.5, -7", WRONG),
        ("contains", "7", "that is 7.", RIGHT),
        ("contains", "1234", "some 1,234 men", RIGHT),
        ("contains", "102", "10\u00b2", WRONG),
        ("contains", "N'Djamena", "N\u2019Djamena", RIGHT),
        ("contains", "\u304b", "\u304c", WRONG),
        ("contains", "\uc11c", "\uc11d", WRONG),
        ("contains", "U.S.", "the US", WRONG),
        ("contains", "\u5df4\u9ece", "\u662f\u5df4\u9ece\u3002", RIGHT),
        ("last_number", "3 + 4 = 7\n#### 7", "so 7.0", RIGHT),
        ("last_number", "1,204", "1204 or 12", WRONG),
        ("last_number", "-2", "2", WRONG),
        ("last_number", "5", "none", WRONG),
        ("last_number", "0.0000001", "1e-7", RIGHT),
    ],
)
def test_a_response_is_compared_with_the_right_answer_of_its_file(
    part: AnswerPart, expected: str, response: str, score: float
):
    assert ExpectedAnswer(expected, part).score(answer_in(response, part)) == score
