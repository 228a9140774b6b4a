"""From texts and chat messages to token ids, as the student and the teacher read them."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_tip.config import PromptsConfig
from megatron_tip.errors import ConfigError, InputError
from megatron_tip.prompts.files import RawPrompt
from megatron_tip.records import Prompt

logger = logging.getLogger(__name__)

_PROMPTS_PER_BATCH = 4096
"""Prompts that are tokenised together; the tokenizer's own records of a batch take several times the ids' memory."""


class PromptRenderer:
    """Turns texts and chat messages into tokenised prompts, and counts those that are too long."""

    def __init__(self, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._sha256 = hashlib.sha256()
        self._warned_of_end = False
        self._of_teacher = None
        if config.teacher_reads_another:
            settings = {"teacher_prompt_field": "", "teacher_system_prompt": "", "teacher_template_arguments": {}}
            own = config.as_read_by_the_teacher().model_copy(update=settings)
            self._of_teacher = PromptRenderer(own, tokenizer)
        self.num_skipped = 0
        self.note(tokenizer.chat_template, sorted(tokenizer.get_vocab().items()))

    def note(self, *values: Any) -> None:
        """Adds values to what `digest` is of."""
        for value in values:
            self._sha256.update(json.dumps(value).encode())

    def digest(self) -> str:
        """Returns a checksum of all prompts so far as they were before the chat template, and of the tokenizer."""
        return self._sha256.hexdigest()

    def prompts(
        self,
        raw_prompts: Sequence[tuple[str, RawPrompt]],
        first_index: int,
        teacher_prompts: Sequence[RawPrompt] | None = None,
    ) -> list[Prompt]:
        """Returns the prompts within the limits; each has the index of its place in `raw_prompts`, plus `first_index`.

        Args:
            teacher_prompts: what the teacher reads in their place, if it reads something else; None: the same texts,
                rendered with the teacher's settings.

        Raises:
            InputError: a prompt that the template or the tokenizer cannot take, that loses its system message, that
                ends in the end-of-sequence token; a response that would begin differently for the teacher; or all are
                too long.
            ConfigError: a chat template is needed and there is none.
        """
        self.note(*(raw for _, raw in raw_prompts))
        wheres = [where for where, _ in raw_prompts]
        of_teacher = list(zip(wheres, teacher_prompts, strict=True)) if teacher_prompts is not None else raw_prompts
        if self._of_teacher and teacher_prompts is not None:
            self.note(*teacher_prompts)
        usable: list[Prompt] = []
        too_long: list[tuple[int, int]] = []
        for start in range(0, len(raw_prompts), _PROMPTS_PER_BATCH):
            part = slice(start, start + _PROMPTS_PER_BATCH)
            own, others = self._tokenised(raw_prompts[part]), self._as_the_teacher(raw_prompts[part], of_teacher[part])
            for place, ((text, ids), teacher_ids) in enumerate(zip(own, others, strict=True), start):
                if len(ids) > self._config.max_prompt_tokens or len(teacher_ids) > self._config.longest_teacher_prompt:
                    too_long.append((len(ids), len(teacher_ids)))
                else:
                    usable.append(Prompt(first_index + place, text, tuple(ids), teacher_prompt_ids=teacher_ids))
        self.num_skipped += len(too_long)
        if not usable:
            self._refuse_all(too_long)
        return usable

    def _refuse_all(self, lengths: Sequence[tuple[int, int]]) -> None:
        """Raises InputError about prompts of the given lengths, the student's and the teacher's, all too long."""
        shortest, of_teacher = (min(column) for column in zip(*lengths, strict=True))
        limit, setting = self._config.max_prompt_tokens, "max_prompt_tokens"
        if shortest <= limit and of_teacher > self._config.longest_teacher_prompt:
            shortest, limit, setting = of_teacher, self._config.longest_teacher_prompt, "max_teacher_prompt_tokens"
        raise InputError(
            f"prompts.{setting}: all {len(lengths)} prompts are longer than {limit} tokens, the shortest has "
            f"{shortest}; raise it"
        )

    def _as_the_teacher(
        self, own: Sequence[tuple[str, RawPrompt]], of_teacher: Sequence[tuple[str, RawPrompt]]
    ) -> Iterator[tuple[int, ...]]:
        """Yields what the teacher reads in place of each of the student's `own` prompts; nothing if it is the same.

        Raises:
            InputError: a chat template adds something else before the teacher's response than before the student's.
        """
        if self._of_teacher is None:
            yield from [()] * len(own)
            return
        for (where, raw), (_, other) in zip(own, of_teacher, strict=True):
            starts = [self._start_of_response(where, raw), self._of_teacher._start_of_response(where, other)]
            if None not in starts and starts[0] != starts[1]:
                ids = [self._tokenizer(start or "", add_special_tokens=False)["input_ids"] for start in starts]
                raise InputError(
                    f"{where}: expected the teacher's chat template to begin the response as the student's does, with "
                    f"the ids {ids[0]} ({starts[0]!r}), got {ids[1]} ({starts[1]!r}): the response's first token would "
                    "mean something else; use the same template arguments for both"
                )
        for _, ids in self._of_teacher._tokenised(of_teacher):
            yield tuple(ids)

    def _start_of_response(self, where: str, raw: RawPrompt) -> str | None:
        """Returns what the chat template writes before the response; None without a template, or if it cannot tell."""
        text, is_chat = self._render(where, raw)
        if not is_chat:
            return None
        without = self._templated(where, self._messages(raw), add_generation_prompt=False)
        return text.removeprefix(without) if text.startswith(without) else None

    def _tokenised(self, raw_prompts: Sequence[tuple[str, RawPrompt]]) -> Iterator[tuple[str, list[int]]]:
        """Yields the text and the ids of each prompt."""
        texts = [self._render(where, raw) for where, raw in raw_prompts]
        all_ids = self._tokenise([text for text, _ in texts], [is_chat for _, is_chat in texts])
        for (where, _), (text, _), ids in zip(raw_prompts, texts, all_ids, strict=True):
            yield text, self._checked(where, text, ids)

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
        messages = self._messages(raw)
        text = self._templated(where, messages, add_generation_prompt=True)
        self._check_system_message(where, messages, text)
        return text, True

    def _messages(self, raw: RawPrompt) -> list[dict[str, Any]]:
        messages = [{"role": "user", "content": raw}] if isinstance(raw, str) else raw
        if self._config.system_prompt and messages[0]["role"] != "system":
            return [{"role": "system", "content": self._config.system_prompt}, *messages]
        return messages

    def _templated(self, where: str, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        arguments: dict[str, Any] = dict(self._config.template_arguments)
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
            )
        except Exception as error:  # jinja2's own, transformers' for a missing default template, or any of Python's
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{where}: the tokenizer's chat template refuses these messages: {reason}") from error
        assert isinstance(text, str), "tokenize=False gives a text"
        return text

    def _check_system_message(self, where: str, messages: Sequence[dict[str, Any]], text: str) -> None:
        lost = [m["content"] for m in messages if m["role"] == "system" and m["content"].strip() not in text]
        if lost:
            raise InputError(
                f"{where}: expected the system message in the rendered prompt, but the tokenizer's chat template drops "
                f"it ({lost[0]!r:.80}); put it into the user's message, or remove it (prompts.system_prompt)"
            )

    def _tokenise(self, texts: Sequence[str], is_chat: Sequence[bool]) -> list[list[int]]:
        """Returns the ids of each text: a template writes special tokens itself, a plain text gets the tokenizer's."""
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

    def _checked(self, where: str, text: str, ids: list[int]) -> list[int]:
        """Returns `ids`, without an end-of-sequence token that the tokenizer appended by itself."""
        if not ids:
            raise InputError(f"{where}: the tokenizer makes no token of {text!r}")
        end: Any = self._tokenizer.eos_token_id
        if end is None or ids[-1] != end:
            return ids
        bare: list[int] = self._tokenizer([text], add_special_tokens=False)["input_ids"][0]
        if bare and bare[-1] == end:
            raise InputError(
                f"{where}: expected a prompt that the student continues, got one that ends in the end-of-sequence "
                f"token {self._tokenizer.eos_token!r}, which the text or the chat template wrote; remove it there"
            )
        if not self._warned_of_end:
            self._warned_of_end = True
            logger.warning(
                "the tokenizer appends %r to plain texts; prompts are used without it", self._tokenizer.eos_token
            )
        return ids[:-1]
