"""Rollouts as an Arrow table, as its bytes, and as JSON records, all with one schema."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_tip.records import Numbers, Rollout
from megatron_tip.rollout.engine import FINISH_REASONS

_SPANS = pa.list_(pa.list_(pa.int64()))
SCHEMA = pa.schema(
    [
        ("prompt_index", pa.int64()),
        ("sample_index", pa.int64()),
        ("prompt_ids", pa.list_(pa.int64())),
        ("response_ids", pa.list_(pa.int64())),
        ("rollout_logprobs", pa.list_(pa.float64())),
        ("finish_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("environment_spans", _SPANS),
        ("teacher", pa.string()),
        ("teacher_prompt_ids", pa.list_(pa.int64())),
    ]
)
"""The fields of a Rollout, in their order."""

_PYTHON = {pa.int64(): int, pa.float64(): float, pa.string(): str}
_ARRAYS: dict[pa.DataType, type] = {pa.list_(kind): _PYTHON[kind] for kind in (pa.int64(), pa.float64())}
_OPTIONAL = {one.name for one in fields(Rollout) if (one.default, one.default_factory) != (MISSING, MISSING)}
REQUIRED_COLUMNS = [name for name in SCHEMA.names if name not in _OPTIONAL]
"""The columns without which a table holds no rollouts."""


def rollouts_to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """Returns a table of SCHEMA with one row per rollout; floats stay bit-exact."""
    for rollout in rollouts:
        assert len(rollout.rollout_logprobs) == len(rollout.response_ids), "one logprob per response token"
    columns = [_column([getattr(one, column.name) for one in rollouts], column.type) for column in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def rollouts_from_table(table: pa.Table) -> list[Rollout]:
    """Returns the rollouts of a table that has the columns of SCHEMA; their arrays are parts of the table's.

    Columns that have a default may be missing, because older files lack them.
    """
    found = [column for column in SCHEMA if column.name in table.column_names or column.name not in _OPTIONAL]
    columns = [_values(table.column(column.name).combine_chunks(), column.type) for column in found]
    names = [column.name for column in found]
    return [Rollout(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def encode_rollouts(rollouts: Sequence[Rollout] | None) -> bytes:
    """Returns rollouts as Arrow's stream format; no bytes for None."""
    if rollouts is None:
        return b""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(rollouts_to_table(rollouts))
    return sink.getvalue().to_pybytes()


def decode_rollouts(content: bytes) -> list[Rollout] | None:
    """Returns the rollouts that `encode_rollouts` encoded."""
    return rollouts_from_table(pa.ipc.open_stream(content).read_all()) if content else None


def rollout_to_record(rollout: Rollout) -> dict[str, Any]:
    """Returns the rollout's fields by name, ready for `json.dumps`."""
    values = {name: getattr(rollout, name) for name in SCHEMA.names}
    return {name: value.array.tolist() if isinstance(value, Numbers) else value for name, value in values.items()}


def rollout_from_record(record: Any) -> Rollout:
    """Returns the rollout whose fields are in `record`, as parsed from JSON; ignores other keys.

    Fields with a default may be missing, because older files lack them.

    Raises:
        ValueError: a field is missing or of the wrong type, or fields contradict each other; the message names it.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} instead of an object")
    for column in SCHEMA:
        if column.name in record or column.name not in _OPTIONAL:
            _check_type(column.name, column.type, record.get(column.name))
    _check_content(record)
    return Rollout(**{name: _frozen(record[name]) for name in SCHEMA.names if name in record})


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Returns a column of SCHEMA. Ids and logprobs are copied as a whole, because there are millions of them."""
    if kind not in _ARRAYS or not values:
        return pa.array(values, type=kind)
    offsets = np.array(list(accumulate(map(len, values), initial=0)), dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([one.array for one in values]), type=kind)


def _values(column: pa.Array, kind: pa.DataType) -> list[Any]:
    """Returns the values of a column of SCHEMA: arrays for ids and logprobs, tuples for spans."""
    if kind not in _ARRAYS:
        return [_frozen(value) for value in column.to_pylist()]
    numbers = column.values.cast(kind.value_type).to_numpy()
    return [Numbers(numbers[start:end], _ARRAYS[kind]) for start, end in pairwise(column.offsets.to_pylist())]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _is_int64(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _check_type(name: str, kind: pa.DataType, value: Any) -> None:
    if kind == _SPANS:
        expected = "a list of [start, end]"
        fits = isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(map(_is_int64, pair)) for pair in value
        )
    elif pa.types.is_list(kind):
        python = _PYTHON[kind.value_type]
        expected = f"a list of {python.__name__}"
        fits = isinstance(value, list) and all(type(element) is python for element in value)
        if fits and python is int and value and not (_is_int64(min(value)) and _is_int64(max(value))):
            raise ValueError(f"{name} has {min(value)} to {max(value)}, which is outside the range of int64")
    else:
        expected = f"of type {_PYTHON[kind].__name__}"
        fits = _is_int64(value) if kind == pa.int64() else type(value) is _PYTHON[kind]
        expected += " within int64" * (type(value) is int and not fits)
    if not fits:
        raise ValueError(f"{name} is {value!r:.80}, not {expected}")


def _check_content(record: Mapping[str, Any]) -> None:
    num_response_tokens = len(record["response_ids"])
    if not record["prompt_ids"]:
        raise ValueError("prompt_ids is empty")
    if len(record["rollout_logprobs"]) != num_response_tokens:
        raise ValueError(f"{len(record['rollout_logprobs'])} logprobs for {num_response_tokens} response ids")
    if record["finish_reason"] not in FINISH_REASONS:
        raise ValueError(f"finish_reason is {record['finish_reason']!r}, not one of {FINISH_REASONS}")
    spans = record.get("environment_spans", [])
    bounds = [0, *chain.from_iterable(spans), num_response_tokens]
    if spans and any(left >= right for left, right in pairwise(bounds)):
        raise ValueError(
            f"environment_spans is {spans!r:.80}: expected ranges in order within {num_response_tokens} response ids, "
            "with generated ids before, between and after them"
        )
