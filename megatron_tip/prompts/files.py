"""Distinct prompts of JSONL and Parquet files, read in one pass; errors name the file and the line or row."""

import hashlib
import marshal
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_tip.errors import InputError
from megatron_tip.files import is_lfs_pointer, parse_json

# A text, or chat messages with the texts "role" and "content"; other keys are for the chat template.
RawPrompt = str | list[dict[str, Any]]

# The keys of the configuration that name the fields of a row.
_PROMPT, _TEACHER, _TEACHER_PROMPT = "prompts.field", "prompts.teacher_field", "prompts.teacher_prompt_field"
_ANSWER = "prompts.answer_field"


@dataclass
class PromptRow:
    """A distinct prompt of a file. `index`: the place of its first row, from 0. `last_index`: that of its last copy.

    `where`: its first row, for errors. `teacher`: the value of the teacher field, "" without one. `teacher_prompt`:
    what the teacher reads in its place; the prompt itself without such a field. `answer`: the right one, as a text, ""
    without such a field.
    """

    where: str
    prompt: RawPrompt
    teacher: str
    teacher_prompt: RawPrompt
    answer: str
    index: int
    last_index: int


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file. `num_rows`: with copies. `rows`: without, by their first row.

    Rows are copies if they have the same value in the prompt field and in the teacher's fields; their answers must be
    the same.
    """

    num_rows: int
    rows: Sequence[PromptRow]

    @property
    def num_copies(self) -> int:
        return self.num_rows - len(self.rows)


def read_prompt_file(
    path: Path, field: str, teacher_field: str = "", teacher_prompt_field: str = "", answer_field: str = ""
) -> PromptFile:
    """Returns the prompts of a .jsonl or .parquet file. Memory grows with the distinct ones, not with their copies.

    Args:
        teacher_field: the field that names each prompt's teacher; "" for none.
        teacher_prompt_field: the field with what the teacher reads; "" for none.
        answer_field: the field with the right answer, a text or a number; "" for none.

    Raises:
        InputError: the file is missing, has another suffix, holds no prompt, has a line that is empty or not a JSON
            object, is a broken Parquet file, lacks a field or column, or has a prompt that is neither text nor chat
            messages, a teacher that is no text or an answer that is neither text nor number.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(
            f"prompts.path: expected a .jsonl or .parquet file, got {path}; write one JSON object per line, such as "
            '{"prompt": "..."}, into a .jsonl file'
        )
    if not path.is_file():
        raise InputError(f"prompts.path: no file {path}; data sets are not fetched, a file must lie on this machine")
    if is_lfs_pointer(path):
        raise InputError(f"prompts.path: expected prompts, got a Git LFS pointer in {path}; run `git lfs pull` there")
    distinct = _DistinctPrompts(field, teacher_field, teacher_prompt_field, answer_field)
    num_rows = readers[path.suffix](path, distinct)
    if not num_rows:
        raise InputError(f"prompts.path: expected prompts in {path}, got an empty file")
    return PromptFile(num_rows, distinct.rows)


class _DistinctPrompts:
    """The prompts that were read so far, each once.

    `fields`: the fields of a row, in the order of `add`, by the key of the configuration that names each.
    """

    def __init__(self, field: str, teacher_field: str, teacher_prompt_field: str, answer_field: str) -> None:
        fields = {_PROMPT: field, _TEACHER: teacher_field, _TEACHER_PROMPT: teacher_prompt_field}
        fields[_ANSWER] = answer_field
        self.fields = {key: name for key, name in fields.items() if name}
        self.rows: list[PromptRow] = []
        self._known: dict[bytes, PromptRow] = {}

    def add(self, where: str, index: int, values: Sequence[Any]) -> PromptRow:
        """Returns the row's prompt: an earlier one if it is a copy; raises InputError if it is not a prompt."""
        fields, found = self.fields, dict(zip(self.fields, values, strict=True))
        answer = _checked_answer(where, fields[_ANSWER], found[_ANSWER]) if _ANSWER in fields else ""
        key = _key(where, [value for name, value in found.items() if name != _ANSWER])
        row = self._known.get(key)
        if row is None:
            prompt = _checked(where, fields[_PROMPT], found[_PROMPT])
            teacher = _checked_teacher(where, fields[_TEACHER], found[_TEACHER]) if _TEACHER in fields else ""
            own = prompt
            if _TEACHER_PROMPT in fields:
                own = _checked(where, fields[_TEACHER_PROMPT], found[_TEACHER_PROMPT])
            row = self._known[key] = PromptRow(where, prompt, teacher, own, answer, index, index)
            self.rows.append(row)
        if answer != row.answer:
            raise InputError(
                f"prompts.answer_field: expected one answer to each prompt, got {row.answer!r:.80} in {row.where} and "
                f"{answer!r:.80} in {where}; keep one of them"
            )
        row.last_index = index
        return row


def _read_jsonl(path: Path, distinct: _DistinctPrompts) -> int:
    """Adds the file's prompts to `distinct`; returns the number of lines.

    Most copies are the same line. Those are known by their checksum, without decoding them. Only the first line of each
    distinct prompt is remembered, so that lines which differ in other fields alone take time and not memory.
    """
    known: dict[bytes, PromptRow] = {}
    number = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            checksum = _checksum(line.rstrip(b"\r\n"))
            row = known.get(checksum)
            if row is not None:
                row.last_index = number - 1
                continue
            row = distinct.add(where := f"{path}, line {number}", number - 1, _values(where, line, distinct.fields))
            if row.index == number - 1:
                known[checksum] = row
    return number


def _values(where: str, line: bytes, fields: Mapping[str, str]) -> list[Any]:
    """Returns the values of a line's `fields`."""
    if not line.strip():
        raise InputError(f"{where}: expected a JSON object, got an empty line; remove it")
    try:
        record = parse_json(line)
    except ValueError as error:  # also a line that is not UTF-8
        raise InputError(f"{where}: expected a JSON object, got a broken line ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for key, field in fields.items():
        if field not in record:
            raise InputError(_no_field(key, field, where, sorted(record)))
    return [record[field] for field in fields.values()]


def _read_parquet(path: Path, distinct: _DistinctPrompts) -> int:
    """Adds the file's prompts to `distinct`; returns the number of rows."""
    index = 0
    for batch in _batches(path, distinct.fields):
        for values in zip(*(batch.column(field).to_pylist() for field in distinct.fields.values()), strict=True):
            distinct.add(f"{path}, row {index + 1}", index, values)
            index += 1
    return index


def _batches(path: Path, fields: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            for key, field in fields.items():
                if field not in columns:
                    raise InputError(_no_field(key, field, str(path), columns))
            yield from file.iter_batches(_ROWS_PER_BATCH, columns=list(dict.fromkeys(fields.values())))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error


_ROWS_PER_BATCH = 8192
"""Rows that are Python objects at a time."""


def _no_field(key: str, field: str, where: str, found: Sequence[str]) -> str:
    return f"{key}: expected a field of {where}, got {field!r}; set {key} to one that it has: {', '.join(found)}"


def _key(where: str, values: Sequence[Any]) -> bytes:
    """Returns a checksum that rows share if and only if their values are the same."""
    try:
        return _checksum(marshal.dumps(list(values), 0))  # ten times as fast as JSON; version 0 depends on values alone
    except ValueError as error:
        raise InputError(f"{where}: expected texts, numbers, lists and objects, got another value ({error})") from error


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _checked_teacher(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: expected {field!r} to be a text, got {value!r:.200}")
    return value


def _checked_answer(where: str, field: str, value: Any) -> str:
    """Returns the answer as a text. A Parquet column of whole numbers with a gap has floats."""
    text = value.strip() if isinstance(value, str) else ""
    if isinstance(value, float) and math.isfinite(value):
        text = str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        text = str(value)
    if not text:
        raise InputError(
            f"{where}: prompts.answer_field: expected {field!r} to be the right answer, a text or a number, got "
            f"{value!r:.200}; give the row one, or remove it"
        )
    return text


def _checked(where: str, field: str, value: Any) -> RawPrompt:
    if isinstance(value, str) and value:
        _check_text(where, value)
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        for message in value:
            _check_text(where, message["role"] + message["content"])
        if value[-1]["role"] == "assistant":
            raise InputError(
                f"{where}: expected messages that the student is to answer, got some that end with the assistant's own "
                "answer; remove that message: it would become part of the prompt"
            )
        # A Parquet column has every key in every message.
        return [{key: item for key, item in message.items() if item is not None} for message in value]
    hint = ""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "from" in part for part in value):
        hint = "; rename 'from' to 'role' (human: user, gpt: assistant) and 'value' to 'content'"
    if value == "":
        raise InputError(f"{where}: expected {field!r} to be a text, got an empty one; remove the line")
    raise InputError(
        f"{where}: expected {field!r} to be a text or a list of messages with the texts 'role' and 'content', got "
        f"{value!r:.200}{hint}"
    )


def _check_text(where: str, text: str) -> None:
    """Raises InputError for half a surrogate pair, which JSON can hold and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: expected Unicode text, got half a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
            f"{error.start}; write the whole character, or remove it"
        ) from None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
