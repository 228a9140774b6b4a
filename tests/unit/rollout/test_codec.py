"""A rollout comes back from every form as it was."""

import io
import json
from dataclasses import fields

import pyarrow.parquet as pq
import pytest

from megatron_tip.records import Rollout
from megatron_tip.rollout.codec import (
    SCHEMA,
    decode_rollouts,
    encode_rollouts,
    rollout_from_record,
    rollout_to_record,
    rollouts_from_table,
    rollouts_to_table,
)

ROLLOUTS = [
    Rollout(3, 0, (1, 2, 3), (4, 5), (-0.10000000149011612, -1 / 3), "stop", 7),
    Rollout(3, 1, (1, 2, 3), (), (), "length", 7),
    Rollout(4, 0, (9,), (8, 7, 6, 5, 4), (-0.5, 0.0, -5e-324, 0.0, -2.0), "turns", 6, ((1, 2), (3, 4)), "maths é"),
]


def test_the_schema_has_every_field_in_order():
    assert SCHEMA.names == [field.name for field in fields(Rollout)]


def test_bytes_give_back_what_was_encoded():
    assert decode_rollouts(encode_rollouts(ROLLOUTS)) == ROLLOUTS
    assert decode_rollouts(encode_rollouts([])) == []
    assert decode_rollouts(encode_rollouts(None)) is None


def test_parts_of_tables_and_tables_of_parts_are_read():
    table = rollouts_to_table(ROLLOUTS)
    assert rollouts_from_table(table.slice(1, 2)) == ROLLOUTS[1:]
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=1)
    assert rollouts_from_table(pq.ParquetFile(file).read()) == ROLLOUTS


def test_records_go_through_json():
    records = json.loads(json.dumps([rollout_to_record(rollout) for rollout in ROLLOUTS]))
    assert json.dumps(rollout_to_record(ROLLOUTS[2])) == (
        '{"prompt_index": 4, "sample_index": 0, "prompt_ids": [9], "response_ids": [8, 7, 6, 5, 4], '
        '"rollout_logprobs": [-0.5, 0.0, -5e-324, 0.0, -2.0], "finish_reason": "turns", "weight_version": 6, '
        '"environment_spans": [[1, 2], [3, 4]], "teacher": "maths \\u00e9", "teacher_prompt_ids": []}'
    )
    assert [rollout_from_record({**record, "prompt_text": "ignored"}) for record in records] == ROLLOUTS


def test_an_id_outside_int64_is_no_rollout():
    record = json.loads(json.dumps(rollout_to_record(ROLLOUTS[0])))
    assert rollout_from_record({**record, "response_ids": [0, 2**63 - 1]}).response_ids == (0, 2**63 - 1)
    with pytest.raises(ValueError, match="response_ids has 0 to 9223372036854775808, which is outside the range"):
        rollout_from_record({**record, "response_ids": [0, 2**63]})
