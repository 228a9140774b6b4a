"""Collectives for small values that one rank knows and every rank needs."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def broadcast_bytes(
    content: bytes, *, source: int, device: torch.device | str, group: dist.ProcessGroup | None = None
) -> bytes:
    """Returns the `content` of global rank `source` on every rank; other ranks' `content` is ignored.

    Collectives: two broadcasts (length, bytes) over `group`, or over the world without one. Over the world the length
    goes between CPUs: ranks that wait for the source, for minutes while it generates, sleep in a socket. On a GPU they
    would spin, and take its time from a server beside them.
    """
    is_source = dist.get_rank() == source
    length = torch.tensor([len(content)], dtype=torch.int64, device=waiting_device(device, group))
    dist.broadcast(length, src=source, group=group)
    data = torch.empty(int(length), dtype=torch.uint8, device=device)
    if is_source and content:
        data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(data, src=source, group=group)
    return content if is_source else data.cpu().numpy().tobytes()


def waiting_device(device: torch.device | str, group: dist.ProcessGroup | None) -> torch.device | str:
    """Returns the device of a value that ranks may have to wait for: the CPU over the world, which has gloo as well;
    over another group, which may have NCCL alone, `device`.
    """
    return "cpu" if group is None else device


def broadcast_json(
    value: Any, *, source: int, device: torch.device | str, group: dist.ProcessGroup | None = None
) -> Any:
    """Returns the `value` of global rank `source` on every rank, through JSON: numbers, strings, lists and dicts.

    Collectives: those of `broadcast_bytes`. Other ranks' `value` is ignored.
    """
    content = json.dumps(value).encode() if dist.get_rank() == source else b""
    return json.loads(broadcast_bytes(content, source=source, device=device, group=group))


def gather_json(value: Any, *, device: torch.device | str, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns every rank's `value` in rank order, on every rank, through JSON.

    Collectives: two all-gathers (lengths, bytes padded to the longest) over `group`, or over the world without one.
    """
    payload = json.dumps(value).encode()
    size = dist.get_world_size(group)
    lengths = torch.empty(size, dtype=torch.int64, device=device)
    dist.all_gather(list(lengths.split(1)), torch.tensor([len(payload)], device=device), group=group)
    padded = torch.frombuffer(bytearray(payload.ljust(int(lengths.max()))), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=group)
    return [json.loads(data.cpu().numpy().tobytes()) for data in gathered]


def agree_on_maxima(values: Sequence[int]) -> list[int]:
    """Returns each value's maximum over the world, on every rank. One all-reduce of a few integers, between CPUs."""
    maxima = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return maxima.tolist()
