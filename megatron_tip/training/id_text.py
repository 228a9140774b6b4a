"""The text of a single token id, even if the token is only a part of a character."""

import re
from functools import cache

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_CUT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def id_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what the tokenizer decodes; of a token that is a part of a character, its bytes as "⟨E2⟩⟨80⟩"."""
    text = str(tokenizer.decode([token]))
    if _CUT not in text:
        return text
    content = _bytes_of(str(tokenizer.convert_ids_to_tokens(token)))
    if content is None:
        return text
    shown = content.decode("utf-8", errors="backslashreplace")
    return re.sub(r"\\x([0-9a-f]{2})", lambda byte: f"\u27e8{byte[1].upper()}\u27e9", shown)


def _bytes_of(spelled: str) -> bytes | None:
    """Returns the bytes of a token of a byte-level vocabulary; None if it is of another kind."""
    if found := _BYTE.fullmatch(spelled):  # sentencepiece's byte fallback
        return bytes([int(found[1], 16)])
    byte_of = _byte_of()
    return bytes(byte_of[letter] for letter in spelled) if set(spelled) <= byte_of.keys() else None


@cache
def _byte_of() -> dict[str, int]:
    """Returns the byte for which each letter stands in byte-level vocabularies (GPT-2's and later)."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}
