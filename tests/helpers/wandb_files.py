"""What W&B's own files hold, read with W&B's own reader."""

import json
from pathlib import Path
from typing import Any

from megatron_tip.observability.wandb_tracker import wandb  # first: it sets wandb's environment
from tests.helpers.processes import wait_until

wandb_internal_pb2 = wandb.proto.wandb_internal_pb2


def finished_records_of(path: Path) -> list[wandb_internal_pb2.Record]:
    """What the file of a finished run holds. Offline, `finish` may return a moment before W&B's process wrote it."""
    wait_until(lambda: any(record.WhichOneof("record_type") == "exit" for record in records_of(path)))
    return records_of(path)


def records_of(path: Path) -> list[wandb_internal_pb2.Record]:
    """What a .wandb file holds, also one whose run was killed."""
    from wandb.sdk.internal.datastore import DataStore

    if not path.stat().st_size:  # killed before the first block was full
        return []
    store, records = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        records.append(record)
    return records


def history_of(records: list[wandb_internal_pb2.Record]) -> list[dict[str, Any]]:
    items = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in of_step} for of_step in items]
