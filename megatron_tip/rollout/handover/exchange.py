"""Handles of weight buckets, gathered from the trainer ranks that share a GPU with a server."""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import EngineError, OutputError
from megatron_tip.parallel.collectives import broadcast_json, gather_json
from megatron_tip.rollout.handover.buckets import BucketBounds, WeightBucket, weight_buckets
from megatron_tip.rollout.handover.shared_memory import handles, shared_buffer


class HandleExchange:
    """The part of all ranks in a sync by IPC: every rank fills the same buckets from its own stream of full tensors.

    When a bucket is complete, rank 0 says how many handles it wants of each rank (`wanted`), and gets them
    (`received`). This happens in the streams that `lead` and `follow` return: whoever exhausts them takes part,
    whatever fails in between. Collectives over the world per bucket: two broadcasts; if handles are wanted also two
    all-gathers.

    A rank that hands over holds at most two buckets: the one that servers load, and the one that it fills.

    Args:
        bucket_bytes: the same on all ranks.
        handing_ranks: those that handles may be wanted of; other followers hold no bucket.
    """

    def __init__(self, bucket_bytes: int, device: torch.device, handing_ranks: Collection[int]) -> None:
        self.wanted: dict[int, int] = {}
        self.received: dict[int, list[str]] = {}
        self.bucket_bytes = bucket_bytes
        self._handing_ranks = handing_ranks
        self._device = device

    def lead(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields `weights`; for rank 0. When whoever takes them completes a bucket, `received` has its handles."""
        bounds = BucketBounds(self.bucket_bytes)
        for name, tensor in weights:
            if bounds.add(tensor):
                self._exchange(lambda count: [])
            yield name, tensor
        if bounds.used:
            self._exchange(lambda count: [])

    def follow(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Fills the buckets and gives rank 0 their handles; for every other rank. Yields nothing.

        Raises:
            OutputError, EngineError: the memory for a bucket was missing, or could not be shared; raised at the end,
                and no handle is given after it.
        """
        if dist.get_rank() not in self._handing_ranks:
            for _ in self.lead(weights):
                pass
            return
        failures: list[OutputError | EngineError] = []

        def new_buffer(num_bytes: int) -> Tensor:
            try:
                if not failures:
                    return shared_buffer(num_bytes, self._device)
            except (OutputError, EngineError) as error:  # the other ranks still exchange
                failures.append(error)
            return torch.empty(num_bytes, dtype=torch.uint8)

        def export(bucket: WeightBucket, count: int) -> list[str]:
            try:
                return [] if failures else handles(bucket, count)
            except EngineError as error:
                failures.append(error)
                return []

        for bucket in weight_buckets(weights, self.bucket_bytes, new_buffer, reuse=False):
            self._exchange(partial(export, bucket))
        yield from ()
        if failures:
            raise failures[0]

    def _exchange(self, export: Callable[[int], list[str]]) -> None:
        """Gives rank 0 the handles that it wants of this rank, which `export` returns."""
        rank, size = dist.get_rank(), dist.get_world_size()
        counts = broadcast_json([self.wanted.get(one, 0) for one in range(size)], source=0, device=self._device)
        self.received = {}
        if any(counts):
            self.received = dict(enumerate(gather_json(export(counts[rank]), device=self._device)))
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # frees what servers have let go of
