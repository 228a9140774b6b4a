"""Tables on disk: Parquet with zstd, written whole or not at all, a JSON description in the file's own metadata."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from megatron_tip.errors import InputError
from megatron_tip.observability.run_folder import atomic_write_bytes, output_errors

_KEY = b"megatron_tip"


def write_table(path: Path, table: pa.Table, about: Mapping[str, Any]) -> str:
    """Writes `table` with its description `about`; returns the SHA-256 of the file. Makes the folder.

    Raises:
        OutputError: it cannot be written.
    """
    buffer = io.BytesIO()
    described = table.replace_schema_metadata({_KEY: json.dumps(about).encode()})
    parquet.write_table(described, buffer, compression="zstd")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_table(path: Path, *, format_name: str, sha256: str | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """The table and its description.

    Args:
        format_name: what the description must give as its format. sha256: of the file, where it is known.

    Raises:
        InputError: no such file, a truncated or damaged one, or one of another format.
    """
    try:
        content = path.read_bytes()
        table = parquet.read_table(io.BytesIO(content))
    except OSError as error:  # pyarrow's own for a broken file is one too
        reason = error.strerror or str(error).splitlines()[0]
        raise InputError(f"{path}: expected a Parquet file, cannot read it: {reason}; make it again") from error
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: expected a whole Parquet file, got a truncated or damaged one ({reason}); make it again"
        ) from error
    if sha256 is not None and (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise InputError(
            f"{path}: expected the file with SHA-256 {sha256:.12}, got {got:.12}: it was changed or damaged"
        )
    about = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    if about.get("format") != format_name:
        raise InputError(f"{path}: expected a table of the format {format_name!r}, got {about.get('format')!r}")
    return table, about
