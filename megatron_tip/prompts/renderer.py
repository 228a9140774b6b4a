"""From texts and chat messages to token ids, as the student reads them."""

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
        self.num_skipped = 0
        self.note(tokenizer.chat_template, sorted(tokenizer.get_vocab().items()))

    def note(self, *values: Any) -> None:
        """Adds values to what `digest` is of."""
        for value in values:
            self._sha256.update(json.dumps(value).encode())

    def digest(self) -> str:
        """Returns a checksum of all prompts so far as they were before the chat template, and of the tokenizer."""
        return self._sha256.hexdigest()

    def prompts(self, raw_prompts: Sequence[tuple[str, RawPrompt]], first_index: int) -> list[Prompt]:
        """Returns the prompts within the limit; each has the index of its place in `raw_prompts`, plus `first_index`.

        Raises:
            InputError: a prompt that the template or the tokenizer cannot take, that loses its system message, that
                ends in the end-of-sequence token; or all are too long.
            ConfigError: a chat template is needed and there is none.
        """
        self.note(*(raw for _, raw in raw_prompts))
        usable: list[Prompt] = []
        too_long: list[int] = []
        for start in range(0, len(raw_prompts), _PROMPTS_PER_BATCH):
            for place, (text, ids) in enumerate(
                self._tokenised(raw_prompts[start : start + _PROMPTS_PER_BATCH]), start
            ):
                if len(ids) > self._config.max_prompt_tokens:
                    too_long.append(len(ids))
                else:
                    usable.append(Prompt(first_index + place, text, tuple(ids)))
        self.num_skipped += len(too_long)
        if not usable:
            raise InputError(
                f"prompts.max_prompt_tokens: all {len(too_long)} prompts are longer than "
                f"{self._config.max_prompt_tokens} tokens, the shortest has {min(too_long)}; raise it"
            )
        return usable

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
        messages = [{"role": "user", "content": raw}] if isinstance(raw, str) else raw
        if self._config.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._config.system_prompt}, *messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's own, transformers' for a missing default template, or any of Python's
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{where}: the tokenizer's chat template refuses these messages: {reason}") from error
        assert isinstance(text, str), "tokenize=False gives a text"
        self._check_system_message(where, messages, text)
        return text, True

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
