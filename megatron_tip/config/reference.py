"""The printed reference of all keys."""

import textwrap

from megatron_tip.config.keys import keys_of, sections

COLUMNS = 80


def reference() -> str:
    """Returns every section and key with its type, default and description, as plain text of at most 80 columns."""
    blocks = [
        _filled(
            "Keys of CONFIG.toml. Each can be overridden as section.key=value; the value is read as TOML, bare words "
            "as text. Relative paths are relative to the current directory."
        )
        + "\n"
    ]
    for name, section in sections().items():
        blocks.append(_filled(f"[{name}]  {section.__doc__}") + "\n")
        for key in keys_of(name):
            head = _filled(f"{key.short_name}: {key.expected}, {key.default}", indent=2, hanging=4)
            blocks.append(f"{head}\n{_filled(key.description, indent=6)}\n")
    return "\n".join(blocks)


def _filled(text: str, *, indent: int = 0, hanging: int = 0) -> str:
    first, rest = " " * indent, " " * (indent + hanging)
    return textwrap.fill(text, COLUMNS, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
