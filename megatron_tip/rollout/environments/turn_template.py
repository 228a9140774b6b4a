"""The chat template's delimiters around an observation, between two turns of the student, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_tip.errors import ConfigError

_TURN, _OBSERVATION = "megatron-tip's turn", "megatron-tip's observation"


@dataclass(frozen=True)
class TurnTemplate:
    """The ids between the stop id of a student's turn and its next turn: `before`, the observation, `after`.

    Only new text is tokenised: sampled ids stay as they are, and each part is tokenised on its own.
    """

    tokenizer: PreTrainedTokenizerBase
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, role: str, stop_token_ids: Sequence[int]) -> "TurnTemplate":
        """Derives the delimiters by rendering a conversation in which an observation of `role` follows a turn.

        The stop id that the student samples replaces the template's end of turn.

        Raises:
            ConfigError: the chat template is missing, or it refuses, omits or changes such an observation.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                "rollout.environment: needs a chat template, whose delimiters separate the turns, and the student's "
                "tokenizer has none; use a chat model"
            )
        between, after = _delimiters(tokenizer, role)
        for stop in sorted((_text(tokenizer, [stop]) for stop in stop_token_ids), key=len, reverse=True):
            if between.lstrip().startswith(stop):
                between = between.lstrip().removeprefix(stop)
                break
        if not (between or after):
            raise ConfigError(
                "rollout.environment: the student's chat template writes nothing around an observation, so that the "
                "student could not tell it from its own turn; use a chat model"
            )
        return cls(tokenizer, _ids(tokenizer, between), _ids(tokenizer, after))

    def observation_ids(self, text: str) -> tuple[int, ...]:
        """Returns the ids from after the student's stop id to the start of its next turn.

        Special tokens in `text` are encoded as plain text: an environment cannot end its own turn or begin another's.
        """
        own = _ids(self.tokenizer, text, split_special_tokens=True)
        return self.before + own + self.after

    def turn_text(self, ids: Sequence[int]) -> str:
        """Returns the student's text, with special tokens."""
        return _text(self.tokenizer, ids)


def _delimiters(tokenizer: PreTrainedTokenizerBase, role: str) -> tuple[str, str]:
    messages = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": _TURN},
        {"role": role, "content": _OBSERVATION},
    ]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"rollout.observation_role: the student's chat template refuses a message of role {role!r} after the "
            f"assistant's ({error}); set another role"
        ) from error
    assert isinstance(rendered, str), "tokenize=False gives a text"
    _, found_turn, rest = rendered.partition(_TURN)
    between, found_observation, after = rest.partition(_OBSERVATION)
    if not (found_turn and found_observation):
        raise ConfigError(
            f"rollout.observation_role: the student's chat template omits or changes a message of role {role!r} "
            f"after the assistant's; set another role. It wrote {rendered!r:.200}"
        )
    return between, after


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, split_special_tokens: bool = False) -> tuple[int, ...]:
    if not text:
        return ()
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"])


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False)
    assert isinstance(text, str), "one sequence gives one text"
    return text
