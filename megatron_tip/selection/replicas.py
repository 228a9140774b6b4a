"""The data-parallel replicas that decide a selection together: the only place of this folder that communicates."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Replicas:
    """The replicas of one data-parallel group; `group=None` is a single replica, never "world"."""

    group: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the elementwise sum over replicas, equal on all of them; overwrites `tensor`. 1 all-reduce."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns `[num_replicas, *tensor.shape]`, equal on all replicas. 1 all-gather."""
        if self.group is None:
            return tensor[None]
        gathered = tensor.new_empty((self.group.size() * tensor.numel(),))
        dist.all_gather_into_tensor(gathered, tensor.reshape(-1), group=self.group)
        return gathered.view(-1, *tensor.shape)


@dataclass
class _Exchange:
    """What the threads of `run_simulated` share."""

    barrier: threading.Barrier
    slots: list[Tensor]


@dataclass(frozen=True)
class SimulatedReplica(Replicas):
    """One of many replicas that live as threads of this process; counts what a real replica would send."""

    rank: int = 0
    exchange: _Exchange | None = None
    sent_bytes: list[int] = field(default_factory=list)

    def sum(self, tensor: Tensor) -> Tensor:
        return self.gather(tensor).sum(dim=0, dtype=tensor.dtype)

    def gather(self, tensor: Tensor) -> Tensor:
        assert self.exchange is not None, "a simulated replica is made by run_simulated"
        self.sent_bytes.append(tensor.numel() * tensor.element_size())
        self.exchange.slots[self.rank] = tensor
        self.exchange.barrier.wait()
        gathered = torch.stack(self.exchange.slots)
        self.exchange.barrier.wait()
        return gathered


def run_simulated(fn: Callable[[SimulatedReplica], Result], num_replicas: int) -> list[Result]:
    """Returns `fn(replica)` of each of `num_replicas` replicas, run as threads of this process: for tests and benches.

    Raises the first replica's exception; a replica that leaves a collective out breaks the barrier of the others.
    """
    exchange = _Exchange(threading.Barrier(num_replicas), [torch.empty(0)] * num_replicas)
    outcomes: list[Result | BaseException] = [RuntimeError("did not run")] * num_replicas

    def work(rank: int) -> None:
        try:
            outcomes[rank] = fn(SimulatedReplica(rank=rank, exchange=exchange))
        except BaseException as error:
            outcomes[rank] = error
            exchange.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return outcomes  # type: ignore[return-value]
