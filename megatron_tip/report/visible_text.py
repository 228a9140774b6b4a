"""A model's text made visible: characters that have no shape are given one."""

from unicodedata import category

NEWLINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"
_SHAPELESS = frozenset(("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"))
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
"""Characters that are letters, marks or symbols by category, but are drawn as nothing."""
_JOINER, _EMOJI_STYLE, _CIRCLE = "\u200d", "\ufe0f", "\N{DOTTED CIRCLE}"
_EMOJI_TO_COME = range(0x1F000, 0x1FB00)
"""Pictures of newer Unicode versions than Python's: unassigned here, but drawn, or shown as a box, so harmless."""


def visible(text: str, *, newlines: bool = False) -> str:
    """Returns `text` with everything invisible replaced by something visible.

    Replaced are characters of Unicode's categories for control, format, unassigned, private and surrogate characters
    and line separators, blank letters, and variation selectors. A combining mark without a letter before it gets a
    dotted circle. Characters that join or style an emoji stay if they do so. Tabs and, with `newlines`, line feeds are
    marked and kept. The result is not escaped for HTML.
    """
    shown = text if text.isascii() and text.isprintable() else "".join(_shapes(text))
    return shown.replace("\n", NEWLINE) if newlines else shown


def _shapes(text: str) -> list[str]:
    shapes: list[str] = []
    for place, character in enumerate(text):
        kind = category(character)
        before = text[place - 1] if place and shapes[-1] == text[place - 1] else ""  # as shown
        if character == "\n" or _styles_an_emoji(character, before, text[place + 1 : place + 2]):
            shapes.append(character)
        elif _is_shapeless(character, kind):
            shapes.append(_shape(character))
        elif kind.startswith("M") and before in ("", "\n"):
            shapes.append(_CIRCLE + character)
        else:
            shapes.append(character)
    return shapes


def _is_shapeless(character: str, kind: str) -> bool:
    if kind == "Cn":
        return ord(character) not in _EMOJI_TO_COME
    return kind in _SHAPELESS or character in _BLANK or _is_variation_selector(character)


def _is_variation_selector(character: str) -> bool:
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def _styles_an_emoji(character: str, before: str, after: str) -> bool:
    """Returns whether `character` is the emoji style of a symbol or keycap, or joins two pictures."""
    if character == _EMOJI_STYLE:
        return before != "" and (category(before) in ("So", "Sm", "Nd") or before in "#*\u203c\u2049")
    is_picture = before == _EMOJI_STYLE or (before != "" and category(before) in ("So", "Sk"))
    return character == _JOINER and is_picture and after != "" and category(after) == "So"


def _shape(character: str) -> str:
    code = ord(character)
    if code == 0x09:
        return "\N{RIGHTWARDS ARROW TO BAR}\t"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    return f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{code:04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
