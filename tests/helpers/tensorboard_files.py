"""What TensorBoard's event files hold."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def values_of(path: Path) -> Iterator[tuple[int, Any]]:
    """The step and the value of every summary in an event file, also one whose run was killed."""
    from tensorboardX.proto.event_pb2 import Event

    data, start = path.read_bytes(), 0
    while start < len(data):  # a TFRecord: length, its checksum, content, its checksum
        (length,) = struct.unpack_from("<Q", data, start)
        event = Event.FromString(data[start + 12 : start + 12 + length])
        yield from ((event.step, value) for value in event.summary.value)
        start += 12 + length + 4
