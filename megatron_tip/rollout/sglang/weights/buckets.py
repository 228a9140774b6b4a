"""A stream of tensors cut into buckets of bytes, so that a sync holds one bucket, never the whole model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightBucket:
    """Consecutive tensors: `data` is `[bytes]` uint8, in the order of `names`.

    `data` is the sender's buffer, which the next bucket overwrites. `dtypes` are torch's names: "float32".
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    data: Tensor


def weight_buckets(
    weights: Iterable[tuple[str, Tensor]], bucket_bytes: int, device: torch.device | str
) -> Iterator[WeightBucket]:
    """Yields `weights` in buckets of at most `bucket_bytes` on `device`; a larger tensor gets its own bucket.

    Every tensor begins at a multiple of its item size. Memory: one buffer of the largest bucket.
    """
    buffer = torch.empty(bucket_bytes, dtype=torch.uint8, device=device)
    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[list[int]] = []
    used = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        # The receiver expects no gaps: a tensor that would not be aligned opens a new bucket.
        if names and (used + size > buffer.numel() or used % tensor.element_size()):
            yield WeightBucket(names, dtypes, shapes, buffer[:used])
            names, dtypes, shapes, used = [], [], [], 0
            if buffer.numel() > bucket_bytes:
                buffer = torch.empty(bucket_bytes, dtype=torch.uint8, device=device)
        if size > buffer.numel():
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        buffer[used : used + size].copy_(tensor.detach().contiguous().flatten().view(torch.uint8))
        names.append(name)
        dtypes.append(str(tensor.dtype).removeprefix("torch."))
        shapes.append(list(tensor.shape))
        used += size
    if names:
        yield WeightBucket(names, dtypes, shapes, buffer[:used])
