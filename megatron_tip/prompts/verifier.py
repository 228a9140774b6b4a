"""What a held-out answer is worth: by the verifier of its task, or against the right answer in its file."""

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from megatron_tip.errors import InputError
from megatron_tip.records import Rollout

AnswerPart = Literal["whole", "last_number", "contains"]

ACCURACY, SCORE = "heldout/task_accuracy", "heldout/task_score"

_NUMBER = re.compile(
    r"(?:(?<!\w)-[$€£]?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|(?<!\d)\.\d+)", re.ASCII
)
"""A number in English notation; in "5-3" the minus sign belongs to neither."""
_SIGNS = str.maketrans({"\u2212": "-", "\u2018": "'", "\u2019": "'"})
_NOT_OF_A_NUMBER = str.maketrans(dict.fromkeys(",$€£"))
_WITH_ACCENTS = ("LATIN", "GREEK", "CYRILLIC")
"""Scripts whose marks are accents; in others a mark makes another letter."""

logger = logging.getLogger(__name__)


class Scored(Protocol):
    """A question that knows what an answer to it is worth."""

    def score(self, answer: str) -> float:
        """Returns 1 for a right answer, 0 to below 1 for another; raises InputError if it cannot be scored."""
        ...


@dataclass(frozen=True)
class ExpectedAnswer:
    """The right answer to a question, as its file has it. `part`: how a response is compared with it.

    Numbers are compared as numbers, texts without regard to case, accents and the number of spaces, with "whole" also
    to a full stop at the end. With "last_number" the answer is the last number of the text: GSM8K's answers end with
    it. With "contains" it may stand anywhere, but in scripts with capital letters not inside of a longer word.
    """

    text: str
    part: AnswerPart

    @property
    def expected(self) -> str:
        """What a response is compared with; empty if nothing of the text can be."""
        return _plain(answer_in(self.text, self.part), self.part)

    def score(self, answer: str) -> float:
        """Returns 1 for a right answer and 0 for another. `expected` must not be empty."""
        expected, given = self.expected, _plain(answer, self.part)
        if not _NUMBER.fullmatch(expected):
            return float(_occurs(expected, given) if self.part == "contains" else given == expected)
        numbers = _NUMBER.findall(given)
        if self.part != "contains" and numbers != [given]:
            return 0.0
        return float(any(_value(number) == _value(expected) for number in numbers))


class Verifier:
    """Scores responses to held-out questions.

    `questions`: by the index of their prompts. `part`: of a response, what is taken as its answer: all of it, or the
    last number in it.
    """

    def __init__(self, questions: Mapping[int, Scored], tokenizer: PreTrainedTokenizerBase, part: AnswerPart) -> None:
        self._questions = questions
        self._tokenizer = tokenizer
        self._part: AnswerPart = part

    def metrics(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Returns the mean score and the share of right answers; nothing if no rollout answers one of the questions.

        An answer on which a verifier fails scores 0, with a warning.
        """
        scores = [self._score(rollout) for rollout in rollouts if rollout.prompt_index in self._questions]
        if not scores:
            return {}
        return {SCORE: sum(scores) / len(scores), ACCURACY: sum(score == 1.0 for score in scores) / len(scores)}

    def _score(self, rollout: Rollout) -> float:
        text = str(self._tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True))
        try:
            return self._questions[rollout.prompt_index].score(answer_in(text, self._part))
        except InputError as error:
            logger.warning("an answer scores 0: %s", error)
            return 0.0


def answer_in(text: str, part: AnswerPart) -> str:
    """Returns the answer in a text; with "last_number" an empty one if there is no number."""
    if part != "last_number":
        return text.strip()
    numbers = _NUMBER.findall(text.translate(_SIGNS))
    return numbers[-1].translate(_NOT_OF_A_NUMBER) if numbers else ""


def _value(number: str) -> Decimal:
    return Decimal(number.translate(_NOT_OF_A_NUMBER))


def _occurs(expected: str, text: str) -> bool:
    start = text.find(expected)
    while start >= 0:
        end = start + len(expected)
        if not (_continues(text[start - 1 : start], expected[0]) or _continues(expected[-1], text[end : end + 1])):
            return True
        start = text.find(expected, start + 1)
    return False


def _continues(one: str, next_one: str) -> bool:
    """Returns whether two neighbours are in the same word; Chinese, for one, has no spaces between words."""
    return all(letter.isdigit() or letter.upper() != letter.lower() for letter in (one or " ", next_one or " "))


def _plain(text: str, part: AnswerPart) -> str:
    """Returns the text in lower case, without accents, with single spaces; with "whole" without its last full stop."""
    letters, base = [], " "
    for one in unicodedata.normalize("NFD", text.casefold().translate(_SIGNS)):
        if not unicodedata.combining(one):
            base = one
        elif unicodedata.name(base, "").startswith(_WITH_ACCENTS):
            continue
        letters.append(one)
    words = " ".join(unicodedata.normalize("NFC", "".join(letters)).split())
    return words.rstrip(" .") if part == "whole" else words
