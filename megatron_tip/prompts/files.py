"""Prompts from JSONL and Parquet files; errors name the file and the line or row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_tip.errors import InputError
from megatron_tip.files import parse_json

# A text, or chat messages with the texts "role" and "content"; other keys are for the chat template.
RawPrompt = str | list[dict[str, Any]]


def read_prompt_file(path: Path, field: str) -> list[tuple[str, RawPrompt]]:
    """Returns `(where, prompt)` for every line or row of a .jsonl or .parquet file, in order; `where` is for errors.

    Raises:
        InputError: the file is missing, has another suffix, holds no prompt, has a line that is empty or not a JSON
            object, is a broken Parquet file, lacks the field or column, or has a value that is neither text nor chat
            messages.
    """
    found = [(where, _checked(where, field, value)) for where, value in _read(path, field)]
    if not found:
        raise InputError(f"prompts.path: expected prompts in {path}, got an empty file")
    return found


def read_text_field(path: Path, field: str) -> list[str]:
    """Returns the texts of another field of the same file, in order; raises the errors of `read_prompt_file`."""
    texts = []
    for where, value in _read(path, field):
        if not isinstance(value, str):
            raise InputError(f"{where}: expected {field!r} to be a text, got {value!r:.200}")
        texts.append(value)
    return texts


def _read(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"prompts.path: expected a .jsonl or .parquet file, got {path}")
    if not path.is_file():
        raise InputError(f"prompts.path: no file {path}")
    return readers[path.suffix](path, field)


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                raise InputError(f"{where}: expected a JSON object, got an empty line; remove it")
            try:
                record = parse_json(line)
            except ValueError as error:  # also a line that is not UTF-8
                raise InputError(f"{where}: expected a JSON object, got a broken line ({error})") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
            if field not in record:
                raise InputError(f"{where}: no field {field!r}, only {sorted(record)}")
            yield where, record[field]


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise InputError(f"{path}: no column {field!r}, only {columns}")
            values = [value for batch in file.iter_batches(columns=[field]) for value in batch.column(0).to_pylist()]
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error
    for number, value in enumerate(values, start=1):
        yield f"{path}, row {number}", value


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
    raise InputError(
        f"{where}: expected {field!r} to be a text or a list of messages with the texts 'role' and 'content', got "
        f"{value!r:.200}"
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
