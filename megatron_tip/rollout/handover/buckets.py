"""A stream of tensors cut into buckets of bytes, so that a sync holds one bucket, never the whole model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightBucket:
    """Consecutive tensors: `data` is `[bytes]` uint8, in the order of `names`.

    `data` is the sender's buffer, which the next bucket may overwrite. `dtypes` are torch's names: "float32".
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    data: Tensor


class BucketBounds:
    """The places in a stream of tensors where buckets of at most `bucket_bytes` end; a larger tensor goes alone.

    They follow from the tensors' sizes and types alone. A receiver expects no gaps: a tensor that would not begin at a
    multiple of its item size opens a new bucket.
    """

    def __init__(self, bucket_bytes: int) -> None:
        self.used = 0
        self._bucket_bytes = bucket_bytes

    def add(self, tensor: Tensor) -> bool:
        """Counts a tensor; returns whether the bucket before it is complete without it."""
        size = tensor.numel() * tensor.element_size()
        opens = self.used > 0 and (self.used + size > self._bucket_bytes or self.used % tensor.element_size() > 0)
        self.used = size if opens else self.used + size
        return opens


def weight_buckets(
    weights: Iterable[tuple[str, Tensor]], bucket_bytes: int, new_buffer: Callable[[int], Tensor], *, reuse: bool = True
) -> Iterator[WeightBucket]:
    """Yields `weights` in the buckets of `BucketBounds`.

    Args:
        new_buffer: returns an uninitialised buffer of that many bytes, uint8.
        reuse: the next bucket may overwrite the buffer of the last one; False: each bucket gets its own buffer.
    """
    bounds, buffer, start = BucketBounds(bucket_bytes), None, 0
    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[list[int]] = []
    for name, tensor in weights:
        if bounds.add(tensor):
            assert buffer is not None, "the complete bucket has one"
            yield WeightBucket(names, dtypes, shapes, buffer[:start])
            names, dtypes, shapes, start = [], [], [], 0
            if not reuse or buffer.numel() > bucket_bytes:
                buffer = None
        size = bounds.used - start
        if buffer is None or (not names and size > buffer.numel()):
            buffer = new_buffer(max(size, bucket_bytes))
        buffer[start : start + size].copy_(tensor.detach().contiguous().flatten().view(torch.uint8))
        names.append(name)
        dtypes.append(str(tensor.dtype).removeprefix("torch."))
        shapes.append(list(tensor.shape))
        start += size
    if buffer is not None and names:
        yield WeightBucket(names, dtypes, shapes, buffer[:start])
