"""A view: the tokens of some responses and all facts about them; the source of pages, pictures and the report.

A view has one row per token of each response, including the environment's. It is stored as Parquet with facts about the
whole view as JSON in the metadata, so a file is self-contained and any Parquet reader can read it.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from megatron_tip.errors import InputError
from megatron_tip.files import parse_json
from megatron_tip.statistics import STATISTICS

FORMAT = 1
_KEY = "megatron_tip.token_table"
VALUES = (*(name for name, statistic in STATISTICS.items() if statistic.in_views), "score")
"""The float32 columns, null where unknown: statistics and the rule's score."""

_KNOWN = (
    ("rollout", pa.int32()),  # index in the step's list of rollouts
    ("position", pa.int32()),  # within the response
    ("token_id", pa.int32()),
    ("text", pa.string()),
    ("valid", pa.bool_()),  # may be supervised
    ("selected", pa.bool_()),
)
"""The columns that every view has, without nulls."""

SCHEMA = pa.schema(
    [
        *_KNOWN,
        *((name, pa.float32()) for name in VALUES),
        *((f"{model}_support_ids", pa.list_(pa.int32())) for model in ("student", "teacher")),
        *((f"{model}_support_logprobs", pa.list_(pa.float16())) for model in ("student", "teacher")),
    ]
)


@dataclass(frozen=True)
class ViewedRollout:
    """A response's rollout: its index in the step's list, its prompt's index and text."""

    rollout: int
    prompt_index: int
    sample_index: int
    finish_reason: str
    prompt: str


@dataclass(frozen=True)
class TokenTableFacts:
    """Facts about a whole table.

    `divergence`: the second axis of the quadrants; "" without statistics. `medians`: the whole batch's medians, which
    divide both axes; None without statistics. `points`: [entropy, divergence, selected] of some tokens of the replica.
    `id_texts`: the text of every id in a support.
    """

    step: int
    rule: str
    retention_ratio: float
    temperature: float
    divergence: str
    medians: tuple[float, float] | None
    rollouts: tuple[ViewedRollout, ...]
    points: tuple[tuple[float, float, bool], ...] = ()
    id_texts: Mapping[int, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class TokenTable:
    """A view. `tokens` has the columns of SCHEMA."""

    facts: TokenTableFacts
    tokens: pa.Table

    @staticmethod
    def of_columns(facts: TokenTableFacts, columns: Mapping[str, Sequence[Any] | pa.Array]) -> "TokenTable":
        """Returns the table of `columns`, which have one length; missing columns of SCHEMA become null."""
        num_rows = len(columns["token_id"])
        arrays = [
            pa.array(columns[name], type=kind) if name in columns else pa.nulls(num_rows, type=kind)
            for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
        ]
        return TokenTable(facts, pa.Table.from_arrays(arrays, schema=SCHEMA))

    def tokens_of(self, viewed: ViewedRollout) -> pa.Table:
        """Returns the rows of one response, which are contiguous."""
        (rows,) = np.nonzero(self.tokens.column("rollout").to_numpy() == viewed.rollout)
        return self.tokens.slice(int(rows[0]), len(rows)) if len(rows) else self.tokens.slice(0, 0)


_FACTS = TypeAdapter(TokenTableFacts)


def token_table_file(folder: Path, step: int) -> Path:
    """Returns the file of the table of `step` in `folder`, the run's views/."""
    return folder / f"step_{step:06d}.parquet"


def encode_token_table(table: TokenTable) -> bytes:
    """Returns the table as the bytes of a Parquet file."""
    content = io.BytesIO()
    with pq.ParquetWriter(content, SCHEMA, compression="zstd") as writer:
        writer.write_table(table.tokens)
        writer.add_key_value_metadata({_KEY: json.dumps(asdict(table.facts), ensure_ascii=False)})
    return content.getvalue()


def decode_token_table(content: bytes, where: str = "view") -> TokenTable:
    """Returns the table that `encode_token_table` encoded. `where`: the source's name in error messages.

    A statistic that the version which wrote the table did not record is null; one that only it recorded is left out.

    Raises:
        InputError: the content is truncated, or of another kind or format.
    """
    try:
        with pq.ParquetFile(io.BytesIO(content)) as file:
            tokens = file.read()
            described = (file.metadata.metadata or {})[_KEY.encode()]
        facts = parse_json(described)
        if facts["format"] != FORMAT:
            raise InputError(f"{where}: expected a token table of format {FORMAT}, got {facts['format']}")
        lacking = [name for name, _ in _KNOWN if name not in tokens.column_names or tokens.column(name).null_count]
        if lacking:
            raise InputError(f"{where}: expected a token table, got one without values in the columns {lacking}")
        return TokenTable(_FACTS.validate_json(described, strict=True), _in_schema(tokens))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, InputError) else _unreadable(where, error) from error


def read_token_table(path: Path) -> TokenTable:
    """Returns the table of a view.

    Raises:
        InputError: there is no such file, or `decode_token_table` refuses it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(str(path), error) from error
    return decode_token_table(content, str(path))


def _in_schema(tokens: pa.Table) -> pa.Table:
    """Returns the columns of SCHEMA, null where `tokens` lacks one; raises ValueError if supports are not whole."""
    columns = [
        tokens.column(field.name).cast(field.type)
        if field.name in tokens.column_names
        else pa.nulls(tokens.num_rows, type=field.type)
        for field in SCHEMA
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    for model in ("student", "teacher"):
        lists = (table.column(f"{model}_support_{part}") for part in ("ids", "logprobs"))
        of_ids, of_logprobs = (pc.call_function("list_value_length", [one]) for one in lists)
        if not of_ids.equals(of_logprobs):
            raise ValueError(f"the lists of {model}_support_ids and of {model}_support_logprobs differ in length")
    return table


def _unreadable(where: str, error: Exception) -> InputError:
    return InputError(
        f"{where}: expected a token table as written with tracking.view_every_steps, cannot read it: "
        f"{type(error).__name__}: {error!s:.200}; remove the file, or restore it"
    )
