"""Tables on disk: Parquet with zstd, written atomically, with a JSON description in the file's metadata."""

import hashlib
import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from megatron_tip.errors import InputError
from megatron_tip.files import atomic_write_bytes, output_errors, parse_json

_KEY = b"megatron_tip"


def write_table(path: Path, table: pa.Table, about: Mapping[str, Any], *, setting: str) -> str:
    """Writes `table` with its description `about`, and creates the folder; returns the file's SHA-256.

    Raises:
        OutputError: it cannot be written.
    """
    buffer = io.BytesIO()
    described = table.replace_schema_metadata({_KEY: json.dumps(about).encode()})
    parquet.write_table(described, buffer, compression="zstd", write_page_checksum=True)
    with output_errors(path, setting=setting):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, buffer.getvalue(), setting=setting)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_table(
    path: Path, *, format_name: str, columns: Collection[str], keys: Collection[str] = (), sha256: str | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """Returns the table and its description.

    Args:
        format_name: the format that the description must name. columns: that the table must have. keys: that its
            description must have. sha256: of the file, if known; nothing is parsed before it matches.

    Raises:
        InputError: the file is missing, truncated or damaged, has another format, or lacks columns or keys.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a Parquet file, cannot read it: {error.strerror}; make it again") from error
    if sha256 is not None and (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise InputError(
            f"{path}: expected the file with SHA-256 {sha256:.12}, got {got:.12}: it was changed or damaged; make it "
            "again"
        )
    try:
        table = parquet.read_table(io.BytesIO(content), page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:  # OSError: also pyarrow's own for a broken file
        raise InputError(
            f"{path}: expected a whole Parquet file, got a truncated or damaged one ({str(error).splitlines()[0]}); "
            "make it again"
        ) from error
    about = _description(path, table.schema, format_name)
    lacking = [f"column {name}" for name in columns if name not in table.column_names]
    lacking += [f"metadata {key}" for key in keys if key not in about]
    if lacking:
        raise InputError(
            f"{path}: expected {format_name!r} with all its parts, got one without {', '.join(lacking)}; make it again"
        )
    return table, about


def read_about(path: Path, *, format_name: str) -> dict[str, Any]:
    """Returns only the description, from the end of the file; raises what `read_table` raises."""
    try:
        schema = parquet.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: expected a whole Parquet file, cannot read it ({str(error).splitlines()[0]}); make it again"
        ) from error
    return _description(path, schema, format_name)


def _description(path: Path, schema: pa.Schema, format_name: str) -> dict[str, Any]:
    content = (schema.metadata or {}).get(_KEY, b"{}")
    try:
        about = parse_json(content)
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise InputError(
            f"{path}: expected a JSON object in the file's metadata {_KEY.decode()!r}, got {content[:60]!r}; make it "
            "again"
        )
    if about.get("format") != format_name:
        raise InputError(
            f"{path}: expected a table of the format {format_name!r}, got {about.get('format')!r}; make it with this "
            "version"
        )
    return about
