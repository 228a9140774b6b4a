"""Any number of replicas as threads of one process, for tests and benches: the selection runs on them unchanged."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from megatron_tip.selection.replicas import Replicas

Result = TypeVar("Result")


class _Exchange:
    """What the threads of `run_simulated` share: one of them stacks what all have brought."""

    def __init__(self, num_replicas: int) -> None:
        self.brought = [torch.empty(0)] * num_replicas
        self.gathered = torch.empty(0)
        self.barrier = threading.Barrier(num_replicas, action=self._stack)

    def _stack(self) -> None:
        self.gathered = torch.stack(self.brought)


@dataclass(frozen=True)
class SimulatedReplica(Replicas):
    """One of many replicas that live as threads of this process.

    `sent_bytes`: of each collective so far, what a real replica would contribute. `collective_seconds`: of this
    thread's processor time, what the simulation of each collective took.
    """

    rank: int = 0
    exchange: _Exchange | None = None
    sent_bytes: list[int] = field(default_factory=list)
    collective_seconds: list[float] = field(default_factory=list)

    def sum(self, tensor: Tensor) -> Tensor:
        return self._meet(tensor, lambda gathered: gathered.sum(dim=0, dtype=tensor.dtype))

    def gather(self, tensor: Tensor) -> Tensor:
        return self._meet(tensor, torch.clone)

    def _meet(self, tensor: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns what `take` makes of everybody's `tensor`, `[num_replicas, *tensor.shape]`."""
        assert self.exchange is not None, "a simulated replica is made by run_simulated"
        start = time.thread_time()
        self.exchange.brought[self.rank] = tensor
        self.exchange.barrier.wait()
        # the next collective stacks anew, so that this one's stack stays whole for whoever comes late
        result = take(self.exchange.gathered)
        self.sent_bytes.append(tensor.numel() * tensor.element_size())
        self.collective_seconds.append(time.thread_time() - start)
        return result


def run_simulated(fn: Callable[[SimulatedReplica], Result], num_replicas: int) -> list[Result]:
    """Returns `fn(replica)` of each of `num_replicas` replicas, run as threads of this process: for tests and benches.

    Raises the first replica's exception; a replica that leaves a collective out breaks the barrier of the others.
    """
    exchange = _Exchange(num_replicas)
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
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return outcomes  # type: ignore[return-value]
