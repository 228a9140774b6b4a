"""The tasks' own verifiers, given the answers to held-out prompts."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from megatron_tip.errors import InputError
from megatron_tip.prompts.reasoning_tasks import Question
from megatron_tip.records import Rollout

AnswerPart = Literal["whole", "last_number"]

ACCURACY, SCORE = "heldout/task_accuracy", "heldout/task_score"

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

logger = logging.getLogger(__name__)


class Verifier:
    """Scores responses to held-out questions.

    `questions`: by the index of their prompts. `part`: of a response, what is taken as its answer: all of it, or the
    last number in it.
    """

    def __init__(self, questions: Mapping[int, Question], tokenizer: PreTrainedTokenizerBase, part: AnswerPart) -> None:
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
    """Returns the answer in a response; with "last_number" an empty one if there is no number."""
    if part == "whole":
        return text.strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""
