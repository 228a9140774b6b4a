"""Text of a model as a person can see it: what has no shape of its own is given one."""

import re

_SHAPELESS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
NEWLINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"


def visible(text: str, *, newlines: bool = False) -> str:
    """Returns `text` with control, format and bidirectional characters replaced by something that can be seen.

    Tabs and, with `newlines`, line feeds are marked and kept. It is not HTML: whoever shows it escapes it.
    """
    shown = _SHAPELESS.sub(_shape, text)
    return shown.replace("\n", NEWLINE) if newlines else shown


def _shape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code == 0x09:
        return "\N{RIGHTWARDS ARROW TO BAR}\t"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    return f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{code:04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
