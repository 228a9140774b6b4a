"""The prompts of a run: rendered and tokenised once, split into training and held-out, drawn by step."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_tip.config import HeldoutConfig, PromptsConfig
from megatron_tip.errors import ConfigError, InputError
from megatron_tip.prompts.files import RawPrompt, read_prompt_file, read_text_field
from megatron_tip.prompts.reasoning_tasks import generate_questions
from megatron_tip.records import Prompt
from megatron_tip.seeds import derive_seed

logger = logging.getLogger(__name__)


class PromptSource:
    """The training prompts in source order, the choice of each step's prompts, and the held-out prompts.

    `num_skipped`: prompts left out of both for being too long. `num_duplicates`: training prompts left out because a
    held-out prompt has the same text.
    """

    def __init__(
        self,
        training: Sequence[Prompt],
        heldout: Sequence[Prompt],
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool,
        num_skipped: int = 0,
    ) -> None:
        heldout_texts = {prompt.text for prompt in heldout}
        self.training = tuple(prompt for prompt in training if prompt.text not in heldout_texts)
        self.heldout = tuple(heldout)
        self.num_skipped = num_skipped
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
        """
        assert step >= 1, f"steps are counted from 1, got {step}"
        size = len(self.training)
        places = range((step - 1) * self._prompts_per_step, step * self._prompts_per_step)
        orders = {epoch: self._order(epoch) for epoch in {place // size for place in places}}
        return [self.training[orders[place // size][place % size]] for place in places]

    @cached_property
    def digest(self) -> str:
        """A checksum of all prompts in order, by which a continued run recognises its prompts."""
        ids = [[prompt.prompt_ids for prompt in prompts] for prompts in (self.training, self.heldout)]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

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
) -> PromptSource:
    """Returns the run's prompts. Reads files and tokenises; no collective.

    Held-out prompts are the last of a file, or reasoning-gym's under another seed; no training prompt has the same text
    as one. `steps` matters only if prompts are generated and `prompts.num_prompts` is 0.

    Raises:
        InputError: a file is unreadable, a prompt is neither text nor chat messages, or there are too few prompts.
        ConfigError: a needed chat template is missing, or a task is unknown.
        OptionalDependencyError: reasoning-gym is needed and not installed.
    """
    renderer = _Renderer(prompts, tokenizer)
    if prompts.source == "file":
        assert prompts.path is not None, "the configuration holds a path with source = file"
        usable = renderer.prompts(read_prompt_file(prompts.path, prompts.field), first_index=0)
        if prompts.teacher_field:
            teachers = read_text_field(prompts.path, prompts.teacher_field)
            usable = [replace(prompt, teacher=teachers[prompt.index]) for prompt in usable]
        if len(usable) < heldout.num_prompts:
            raise InputError(
                f"{prompts.path}: expected at least {heldout.num_prompts} held-out prompts and one for training, got "
                f"{len(usable)} of at most {prompts.max_prompt_tokens} tokens; lower heldout.num_prompts"
            )
        num_training = len(usable) - heldout.num_prompts
        training, held_out = usable[:num_training], usable[num_training:]
    else:
        num_training = prompts.num_prompts or prompts_per_step * steps
        training = renderer.prompts(_questions(prompts, num_training, derive_seed(seed, 1)), first_index=0)
        held_out = _other_questions(prompts, heldout.num_prompts, seed, training, num_training, renderer)
    if renderer.num_skipped:
        logger.warning("skipped %d prompts longer than %d tokens", renderer.num_skipped, prompts.max_prompt_tokens)
    return PromptSource(
        training,
        held_out,
        prompts_per_step=prompts_per_step,
        seed=seed,
        shuffle=prompts.shuffle,
        num_skipped=renderer.num_skipped,
    )


def _questions(prompts: PromptsConfig, number: int, seed: int) -> list[tuple[str, RawPrompt]]:
    questions = generate_questions(prompts.tasks, number, seed)
    return [(f"reasoning-gym question {i}", question) for i, question in enumerate(questions)]


def _other_questions(
    prompts: PromptsConfig,
    number: int,
    seed: int,
    training: Sequence[Prompt],
    first_index: int,
    renderer: "_Renderer",
) -> list[Prompt]:
    """Returns `number` prompts from another seed with different texts, none of them a training prompt's."""
    seen = {prompt.text for prompt in training}
    found: list[Prompt] = []
    # reasoning-gym seeds question i with seed + i: a neighbouring seed would repeat the training questions.
    candidates = _questions(prompts, 8 * number, derive_seed(seed, 2))
    for prompt in renderer.prompts(candidates, first_index) if candidates else ():
        if len(found) < number and prompt.text not in seen:
            found.append(prompt)
            seen.add(prompt.text)
    if len(found) < number:
        raise InputError(
            f"heldout.num_prompts: expected {number} reasoning-gym questions that are not trained on, got {len(found)} "
            f"among {len(candidates)}; lower it, lower prompts.num_prompts or name more prompts.tasks"
        )
    return found


class _Renderer:
    """A renderer of texts and chat messages into tokenised prompts; it counts those that are too long."""

    def __init__(self, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self.num_skipped = 0

    def prompts(self, raw_prompts: Sequence[tuple[str, RawPrompt]], first_index: int) -> list[Prompt]:
        """Returns the prompts within the limit; their index is their place in `raw_prompts` plus `first_index`."""
        texts = [self._render(where, raw) for where, raw in raw_prompts]
        all_ids = self._tokenise([text for text, _ in texts], [is_chat for _, is_chat in texts])
        usable = []
        for place, ((text, _), ids) in enumerate(zip(texts, all_ids, strict=True)):
            if not ids:
                raise InputError(f"{raw_prompts[place][0]}: the tokenizer gives no token for {text!r}")
            if len(ids) > self._config.max_prompt_tokens:
                self.num_skipped += 1
            else:
                usable.append(Prompt(first_index + place, text, tuple(ids)))
        if not usable:
            raise InputError(
                f"prompts.max_prompt_tokens: all {len(texts)} prompts are longer than {self._config.max_prompt_tokens} "
                f"tokens, the shortest has {min(map(len, all_ids))}; raise it"
            )
        return usable

    def _render(self, where: str, raw: RawPrompt) -> tuple[str, bool]:
        """Returns the text that the model sees, and whether the chat template wrote it."""
        if isinstance(raw, str) and not self._config.apply_chat_template:
            if self._config.system_prompt:
                raise ConfigError(
                    f"prompts.system_prompt: {where} is a plain text and prompts.apply_chat_template is false, so "
                    "there is no place for a system message; set one of the two"
                )
            return raw, False
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"prompts: {where} needs a chat template and the tokenizer has none; use plain texts with "
                "prompts.apply_chat_template = false"
            )
        messages = [{"role": "user", "content": raw}] if isinstance(raw, str) else raw
        if self._config.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._config.system_prompt}, *messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise InputError(f"{where}: the tokenizer's chat template refuses these messages: {error}") from error
        assert isinstance(text, str), "tokenize=False gives a text"
        return text, True

    def _tokenise(self, texts: Sequence[str], is_chat: Sequence[bool]) -> list[list[int]]:
        """Returns the ids of each text. Templates write special tokens themselves; the tokenizer adds the others."""
        bos = self._tokenizer.bos_token
        has_special_tokens = [
            chat or (isinstance(bos, str) and text.startswith(bos)) for text, chat in zip(texts, is_chat, strict=True)
        ]
        ids: list[list[int]] = [[] for _ in texts]
        for complete in set(has_special_tokens):
            places = [place for place, has in enumerate(has_special_tokens) if has == complete]
            batch = self._tokenizer([texts[place] for place in places], add_special_tokens=not complete)["input_ids"]
            for place, one in zip(places, batch, strict=True):
                ids[place] = one
        return ids
