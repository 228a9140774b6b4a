"""What spoils an input: bytes, lines, values of JSON, TOML and Parquet, the file itself."""

import json
import random
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

Draw = random.Random

_NAMES = ("", "step", "format", "eos_token_id", "no such name", "é", "__class__", "..")
_TEXTS = (
    *("", "8", "nan", "true", "../..", "/", "~nobody/x", "a" * 5000, "\x00", "\ud800", "\u202e", "{{ raise }}"),
    *("{% for %}", "[", "file:///etc/passwd", "1e999", "é", " \n"),
)


def odd_value(draw: Draw) -> Any:
    """Returns a value that few programs expect."""
    numbers = (0, -1, 1, 2, 7, 2**31, 2**63, 10**9, 10**400, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"))
    nested: Any = []
    for _ in range(draw.choice((1, 3, 200))):
        nested = [nested] if draw.random() < 0.5 else {"a": nested}
    return draw.choice(
        [*numbers, *_TEXTS, True, False, None, [], {}, [1, "a", None], [[2, 3]], {"type": "linear"}, nested, [0] * 3000]
    )


def spoil_value(value: Any, draw: Draw) -> Any:
    """Returns `value` with one change somewhere within it: replaced, removed, renamed, doubled or added."""
    if not value or not isinstance(value, dict | list) or draw.random() < 0.1:
        return odd_value(draw)
    changed = type(value)(value)
    place = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    action = draw.choice(("into", "into", "into", "into", "replace", "remove", "rename", "add"))
    if action == "into":
        changed[place] = spoil_value(value[place], draw)
    elif action == "replace":
        changed[place] = odd_value(draw)
    elif action == "remove":
        del changed[place]
    elif isinstance(changed, dict):
        changed[draw.choice(_NAMES)] = changed.pop(place) if action == "rename" else odd_value(draw)
    else:
        changed.insert(place, odd_value(draw) if action == "add" else value[place])
    return changed


def spoil_json(content: bytes, draw: Draw) -> bytes:
    return json.dumps(spoil_value(json.loads(content), draw)).encode()


def spoil_json_line(content: bytes, draw: Draw) -> bytes:
    """Returns JSON lines with one of them spoiled."""
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    lines[place] = spoil_json(lines[place], draw) + b"\n"
    return b"".join(lines)


def spoil_toml(content: bytes, draw: Draw) -> bytes:
    """Returns TOML with one change within its values; what TOML has no form for becomes text."""

    def as_toml(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): as_toml(item) for name, item in value.items()}
        if isinstance(value, list):
            return [as_toml(item) for item in value]
        return "null" if value is None else value

    changed = as_toml(spoil_value(tomllib.loads(content.decode()), draw))
    return tomli_w.dumps(changed if isinstance(changed, dict) else {"value": changed}).encode(errors="surrogatepass")


def spoil_safetensors(content: bytes, draw: Draw) -> bytes:
    """Returns a safetensors file with a spoiled header, whose length is right in most cases."""
    size = int.from_bytes(content[:8], "little")
    header = spoil_json(content[8 : 8 + size], draw)
    told = len(header) if draw.random() < 0.8 else draw.choice((0, 2**63, len(header) - 1, len(content)))
    return told.to_bytes(8, "little") + header + content[8 + size :]


def spoil_parquet(content: bytes, draw: Draw) -> bytes:
    """Returns a Parquet file without a column, with one of another type, with nulls, or with fewer rows."""
    table = pq.read_table(pa.BufferReader(content))
    place = draw.randrange(table.num_columns)
    name = table.column_names[place]
    action = draw.choice(("drop", "text", "null", "cut", "numbers", "metadata"))
    if action == "drop":
        table = table.drop_columns([name])
    elif action == "cut":
        table = table.slice(0, draw.randrange(len(table) + 1))
    elif action == "metadata":
        metadata = {key: spoil_text(value, draw) for key, value in (table.schema.metadata or {}).items()}
        table = table.replace_schema_metadata(metadata)
    else:
        made = {"text": "x", "null": None, "numbers": draw.choice((-1, 2**40, 0))}[action]
        table = table.set_column(place, name, pa.array([made] * len(table)))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def spoil_bytes(content: bytes, draw: Draw) -> bytes:
    """Returns `content` cut off, with flipped, inserted or removed bytes, or nothing."""
    place = draw.randrange(len(content) + 1)
    action = draw.choice(("cut", "flip", "insert", "remove", "empty", "mark"))
    if action == "flip" and content:
        place = min(place, len(content) - 1)
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    inserted = draw.choice((b"\x00", b"\xff\xfe", b"\n\n", b'"', b"}", b"[" * 200_000, b"9" * 5000, b"\xc3"))
    return {
        "cut": content[:place],
        "insert": content[:place] + inserted + content[place:],
        "remove": content[:place] + content[place + draw.randrange(1, 40) :],
        "mark": b"\xef\xbb\xbf" + content,
    }.get(action, b"")


def spoil_text(content: bytes, draw: Draw) -> bytes:
    """Returns lines of text with one of them removed, doubled or moved, or spoiled bytes."""
    lines = content.splitlines(keepends=True)
    action = draw.choice(("remove", "double", "move", "bytes", "bytes"))
    if action == "bytes" or not lines:
        return spoil_bytes(content, draw)
    line = lines.pop(draw.randrange(len(lines)))
    for _ in range({"remove": 0, "double": 2, "move": 1}[action]):
        lines.insert(draw.randrange(len(lines) + 1), line)
    return b"".join(lines)


def spoil_place(path: Path, draw: Draw) -> str:
    """Puts something else in the place of a file: nothing, a folder, a link to nowhere or to itself."""
    action = draw.choice(("missing", "folder", "dangling link", "link to itself"))
    path.unlink()
    if action == "folder":
        path.mkdir()
    elif action != "missing":
        path.symlink_to(path.name if action == "link to itself" else "nowhere")
    return action


_BY_SUFFIX: dict[str, Callable[[bytes, Draw], bytes]] = {
    ".json": spoil_json,
    ".jsonl": spoil_json_line,
    ".toml": spoil_toml,
    ".safetensors": spoil_safetensors,
    ".parquet": spoil_parquet,
}


def spoil_file(path: Path, draw: Draw) -> str:
    """Spoils the file; returns in which way. Its values in most cases, else its lines, bytes, or the file itself."""
    if path.is_symlink() or not path.is_file() or not path.stat().st_size:
        path.unlink(missing_ok=True) if not path.is_dir() else shutil.rmtree(path)
        return "removed"
    spoil_values = _BY_SUFFIX.get(path.suffix, spoil_bytes)
    chance = draw.random()
    if chance > 0.95:
        return spoil_place(path, draw)
    spoil = spoil_values if chance < 0.7 else spoil_text
    try:
        content = spoil(path.read_bytes(), draw)
    except (ValueError, OSError, IndexError):  # spoiled already, or its new value has no form there
        spoil = spoil_bytes
        content = spoil(path.read_bytes(), draw)
    path.write_bytes(content)
    return spoil.__name__


def odd_override(names: list[str], draw: Draw) -> str:
    """Returns a `section.key=value` of the command line that may be anything."""
    value = odd_value(draw)
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{draw.choice(names)}={text}".replace("\x00", "").encode(errors="replace").decode()
