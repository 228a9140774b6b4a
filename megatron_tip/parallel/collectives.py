"""Small facts that one rank knows and every rank needs."""

import json
from typing import Any

import torch
import torch.distributed as dist


def broadcast_json(value: Any, *, source: int, device: torch.device, group: dist.ProcessGroup | None = None) -> Any:
    """`value` of global rank `source`, on every rank, through JSON: numbers, strings, lists and dicts.

    Collectives: two broadcasts (length, bytes) over `group`, or over the world without one. What other ranks pass as
    `value` is ignored.
    """
    is_source = dist.get_rank() == source
    payload = json.dumps(value).encode() if is_source else b""
    length = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    dist.broadcast(length, src=source, group=group)
    data = torch.empty(int(length), dtype=torch.uint8, device=device)
    if is_source:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, src=source, group=group)
    return json.loads(bytes(data.tolist()))
