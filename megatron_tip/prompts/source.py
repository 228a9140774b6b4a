"""The prompts of a run: rendered and tokenised once, split into training and held-out, drawn by step."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_tip.config import HeldoutConfig, PromptsConfig
from megatron_tip.errors import InputError
from megatron_tip.prompts.files import PromptFile, RawPrompt, read_prompt_file
from megatron_tip.prompts.reasoning_tasks import Question, generate_questions
from megatron_tip.prompts.renderer import PromptRenderer
from megatron_tip.prompts.verifier import AnswerPart, ExpectedAnswer, Scored
from megatron_tip.records import Prompt
from megatron_tip.seeds import derive_seed

logger = logging.getLogger(__name__)


class PromptSource:
    """The training prompts in source order, the choice of each step's prompts, and the held-out prompts.

    `digest`: a checksum of what the prompts are made from, by which a run recognises its own when it is continued. It
    is not of the rendered texts: a chat template may write today's date.
    `num_copies`: rows of a file left out because an earlier row has the same prompt. `num_skipped`: prompts longer than
    the limit, the teacher's or the student's, left out of both. `num_duplicates`: training prompts left out because
    their text is a held-out one's. `heldout_questions`: those of held-out prompts that can be scored, by index.
    """

    def __init__(
        self,
        training: Sequence[Prompt],
        heldout: Sequence[Prompt],
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool,
        num_copies: int = 0,
        num_skipped: int = 0,
        digest: str = "",
        heldout_questions: Mapping[int, Scored] | None = None,
    ) -> None:
        heldout_texts = {prompt.text for prompt in heldout}
        self.training = tuple(prompt for prompt in training if prompt.text not in heldout_texts)
        self.heldout = tuple(heldout)
        self.num_copies = num_copies
        self.num_skipped = num_skipped
        self.digest = digest
        self.heldout_questions = heldout_questions or {}
        self.num_duplicates = len(training) - len(self.training)
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._shuffle = shuffle
        if not self.training:
            raise InputError(
                f"prompts: none is left for training ({num_skipped} longer than prompts.max_prompt_tokens, "
                f"{len(self.heldout)} held out, {self.num_duplicates} equal to a held-out one)"
            )

    def batch(self, step: int) -> list[Prompt]:
        """Returns the prompts of training step `step`, counted from 1: a pure function of the seed and the step.

        Each epoch goes through all training prompts once, in its own order; a step may reach into the next epoch.
        Copies in a file do not count: each distinct prompt is drawn once.
        """
        assert step >= 1, f"steps are counted from 1, got {step}"
        size = len(self.training)
        places = range((step - 1) * self._prompts_per_step, step * self._prompts_per_step)
        orders = {epoch: self._order(epoch) for epoch in {place // size for place in places}}
        return [self.training[orders[place // size][place % size]] for place in places]

    def _order(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self.training))
        return np.random.default_rng([derive_seed(self._seed), epoch]).permutation(len(self.training)).tolist()


def load_prompts(
    prompts: PromptsConfig,
    heldout: HeldoutConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts_per_step: int,
    steps: int,
    seed: int,
    file: PromptFile | None = None,
) -> PromptSource:
    """Returns the run's prompts. Reads files and tokenises; no collective.

    Held-out prompts are the last of a file, or reasoning-gym's under another seed; no training prompt has the same text
    as one.

    Args:
        steps: matters only if prompts are generated and `prompts.num_prompts` is 0.
        file: the content of `prompts.path`, if it was already read.

    Raises:
        InputError: a file is unreadable, a prompt is neither text nor chat messages, or there are too few prompts.
        ConfigError: a needed chat template is missing, or a task is unknown.
        OptionalDependencyError: reasoning-gym is needed and not installed.
    """
    renderer = PromptRenderer(prompts, tokenizer)
    heldout_questions: Mapping[int, Scored] = {}
    if prompts.source == "file":
        assert prompts.path is not None, "the configuration holds a path with source = file"
        file = file or read_prompt_file(prompts.path, *prompts.row_fields)
        training, held_out = _from_file(prompts, file, heldout.num_prompts, renderer)
        if heldout.verify != "no":
            heldout_questions = _with_answers(held_out, file, heldout.verify)
    else:
        num_training = prompts.num_prompts or prompts_per_step * steps
        own = generate_questions(prompts.tasks, num_training, derive_seed(seed, 1), prompts.task_options)
        training = renderer.prompts(_as_prompts(own), first_index=0)
        found = _other_questions(prompts, heldout.num_prompts, seed, training, num_training, renderer)
        held_out = [prompt for prompt, _ in found]
        heldout_questions = {prompt.index: question for prompt, question in found}
    source = PromptSource(
        training,
        held_out,
        prompts_per_step=prompts_per_step,
        seed=seed,
        shuffle=prompts.shuffle,
        num_copies=file.num_copies if file else 0,
        num_skipped=renderer.num_skipped,
        digest=renderer.digest(),
        heldout_questions=heldout_questions,
    )
    if file:
        logger.info("%s: %d rows, %d distinct; copies are left out", prompts.path, file.num_rows, len(file.rows))
    logger.info(
        "prompts: %d to train on, %d of them distinct; %d held out; left out: %d longer than %d tokens, %d equal to "
        "held-out ones",
        *(len(source.training), len({prompt.text for prompt in source.training}), len(source.heldout)),
        *(source.num_skipped, prompts.max_prompt_tokens, source.num_duplicates),
    )
    if len(source.training) < prompts_per_step:
        logger.warning("%s", fewer_than_a_step(len(source.training), prompts_per_step))
    return source


def fewer_than_a_step(num_prompts: int, prompts_per_step: int) -> str:
    """Returns the warning that a step repeats prompts."""
    return (
        f"prompts: {num_prompts} to train on, fewer than rollout.prompts_per_step = {prompts_per_step}: each step has "
        "some of them several times, and answers them with different samples"
    )


def _from_file(
    prompts: PromptsConfig, file: PromptFile, num_held_out: int, renderer: PromptRenderer
) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the training prompts of a file, and as many held-out ones: the last whose texts differ.

    A prompt's index is its first row. The last ones are those whose last copies come last.
    """
    raw = [(row.where, row.prompt) for row in file.rows]
    of_teacher = [row.teacher_prompt for row in file.rows]
    usable = [
        replace(prompt, index=file.rows[prompt.index].index, teacher=file.rows[prompt.index].teacher)
        for prompt in renderer.prompts(raw, first_index=0, teacher_prompts=of_teacher)
    ]
    if prompts.teacher_field:
        renderer.note(*(row.teacher for row in file.rows))
    if prompts.answer_field:
        renderer.note(*(row.answer for row in file.rows))
    renderer.note(*((row.index, row.last_index) for row in file.rows if row.index != row.last_index))
    last_index = {row.index: row.last_index for row in file.rows}
    held_out: dict[str, Prompt] = {}
    for prompt in sorted(usable, key=lambda prompt: last_index[prompt.index], reverse=True):
        if len(held_out) == num_held_out:
            break
        held_out.setdefault(prompt.text, prompt)
    if len(held_out) < num_held_out:
        raise InputError(
            f"{prompts.path}: expected at least {num_held_out} held-out prompts and one for training, got "
            f"{len(held_out)} different ones of at most {prompts.max_prompt_tokens} tokens; lower heldout.num_prompts"
        )
    chosen = {prompt.index for prompt in held_out.values()}
    return [prompt for prompt in usable if prompt.index not in chosen], list(held_out.values())[::-1]


def _with_answers(held_out: Sequence[Prompt], file: PromptFile, part: AnswerPart) -> dict[int, ExpectedAnswer]:
    """Returns the right answers to held-out prompts, by index; raises InputError for one that nothing can equal."""
    rows = {row.index: row for row in file.rows}
    found = {prompt.index: ExpectedAnswer(rows[prompt.index].answer, part) for prompt in held_out}
    for index, answer in found.items():
        if not answer.expected:
            wanted = "a number" if part == "last_number" else "a text"
            raise InputError(
                f'{rows[index].where}: expected an answer with {wanted}, with heldout.verify = "{part}", got '
                f"{answer.text!r:.80}; correct it, or set another heldout.verify"
            )
    return found


def _as_prompts(questions: Sequence[Question]) -> list[tuple[str, RawPrompt]]:
    return [(f"reasoning-gym question {i}", question.text) for i, question in enumerate(questions)]


def _other_questions(
    prompts: PromptsConfig,
    number: int,
    seed: int,
    training: Sequence[Prompt],
    first_index: int,
    renderer: PromptRenderer,
) -> list[tuple[Prompt, Question]]:
    """Returns `number` prompts from another seed with different texts, none of them a training prompt's."""
    seen = {prompt.text for prompt in training}
    found: list[tuple[Prompt, Question]] = []
    # reasoning-gym seeds question i with seed + i: a neighbouring seed would repeat the training questions.
    candidates = generate_questions(prompts.tasks, 8 * number, derive_seed(seed, 2), prompts.task_options)
    for prompt in renderer.prompts(_as_prompts(candidates), first_index) if candidates else ():
        if len(found) < number and prompt.text not in seen:
            found.append((prompt, candidates[prompt.index - first_index]))
            seen.add(prompt.text)
    if len(found) < number:
        raise InputError(
            f"heldout.num_prompts: expected {number} reasoning-gym questions that are not trained on, got {len(found)} "
            f"among {len(candidates)}; lower it, lower prompts.num_prompts or name more prompts.tasks"
        )
    return found
