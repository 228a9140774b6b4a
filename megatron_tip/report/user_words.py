"""The user's words in a prompt that a chat template has rendered, for headings."""

import re

_USER = re.compile(r"(?:^|[>|\]\n\uff5c])\s*(?:user|human)(?:<[^<>\n]*>|\uff5c>|:|\n)\s*", re.IGNORECASE)
"""Where a user's message begins: the role after a special token, a bracket or a new line, as templates write it."""

_END = re.compile(
    r"<\|[^<>\n]*\|?>|<\uff5c[^<>\n]*\uff5c>|</?s>|\[/INST\]|<end_of_turn>|\n\s*(?:assistant|model)\b:?\s*$"
)
_INST = re.compile(r"\[INST\]\s*")


def user_words(prompt: str) -> str:
    """Returns the last user's message of a rendered prompt; the whole prompt if it has no known form."""
    starts = [match.end() for pattern in (_USER, _INST) for match in pattern.finditer(prompt)]
    if not starts:
        return prompt
    words = _END.split(prompt[max(starts) :])[0].strip()
    return words or prompt
