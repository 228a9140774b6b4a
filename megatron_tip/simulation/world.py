"""The process groups of a simulated rank: nobody else is there, every message is counted."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    Work,
    _create_work_from_future,  # pyright: ignore[reportAttributeAccessIssue]: torch's stub lacks it
)
from torch._subclasses.fake_tensor import FakeTensor
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_tip.simulation.ledger import Ledger

_BACKEND = "simulated"

# torch calls the methods by position; its stub would also prescribe the names of their parameters.
_PythonGroup: Any = dist.ProcessGroup


class Answers:
    """What the other ranks of a simulated world send, where the product reads the values, in the order of its calls.

    `broadcasts`: by other ranks. `replicas`: results of reductions and exchanges over replicas whose values matter.
    `counts`: the most micro-batches of any replica, where all run in step.
    `forward_shapes`, `backward_shapes`: of the tensors from the stage before and the stage after.
    """

    def __init__(self) -> None:
        self.broadcasts: deque[Tensor] = deque()
        self.replicas: deque[Tensor] = deque()
        self.counts: deque[Tensor] = deque()
        self.forward_shapes: deque[tuple[int, ...]] = deque()
        self.backward_shapes: deque[tuple[int, ...]] = deque()

    def check_used(self) -> None:
        left = {name: len(queue) for name, queue in vars(self).items() if queue}
        assert not left, f"the simulated step did not ask for {left}: the order of its messages has changed"


class SimulatedGroup(_PythonGroup):
    """A process group whose other ranks hold what this one holds, unless `answers` says otherwise.

    A sum is thus left as it is, and gathered parts are copies.
    """

    def __init__(self, ledger: Ledger, answers: Answers, ranks: Sequence[int], rank: int, name: str) -> None:
        super().__init__(rank, len(ranks))
        self._ledger, self._answers, self._ranks, self._own_rank, self._name = ledger, answers, ranks, rank, name

    def size(self) -> int:
        return len(self._ranks)

    def rank(self) -> int:
        return self._own_rank

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def pg_name(self) -> str:
        return self._name

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        return _BACKEND

    def _send(self, operation: str, tensors: Sequence[Tensor], *, peer: int | None = None) -> None:
        place = self._ranks[peer] if peer is not None else None
        self._ledger.send(operation, self._name, tensors, peer=place)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        self._send("all_reduce", tensors)
        queue = self._answers.counts or self._answers.replicas
        if getattr(opts, "reduceOp", None) == dist.ReduceOp.MAX and queue and _is_list(tensors[0]):
            _answer(tensors[0], queue)
        return _done()

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        self._send("broadcast", tensors)
        if opts.rootRank != self._own_rank and not isinstance(tensors[0], FakeTensor):
            _answer(tensors[0], self._answers.broadcasts)
        return _done()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        self._send("all_gather", outputs[0])
        for part in outputs[0]:
            part.detach().copy_(inputs[0])
        return _done()

    def all_gather_single(self, output: Tensor, values: Tensor, opts: Any = None) -> Work:
        self._send("all_gather", [output])
        if not isinstance(output, FakeTensor):
            for part in output.detach().view(self.size(), -1):
                part.copy_(values.reshape(-1))
        return _done()

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        for output, values in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, values)
        return _done()

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        self._send("reduce_scatter", inputs[0])
        return _done()

    def reduce_scatter_single(self, output: Tensor, values: Tensor, opts: Any = None) -> Work:
        self._send("reduce_scatter", [values])
        return _done()

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        self._send("reduce_scatter", inputs)
        return _done()

    def all_to_all_single(
        self, output: Tensor, values: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> Work:
        self._send("all_to_all", [values])
        if isinstance(output, FakeTensor):
            return _done()
        if output.is_floating_point():
            output.fill_(1.0)
        else:
            _answer(output, self._answers.replicas)
        return _done()

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        self._send("gather", inputs)
        return _done()

    def send(self, tensors: list[Tensor], destination: int, tag: int = 0) -> Work:
        self._send("send", tensors, peer=destination)
        return _done()

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Work:
        self._send("recv", tensors, peer=source)
        (tensor,) = tensors
        if tensor.dtype == torch.int64 and tensor.shape == (3,):  # Megatron sends each tensor's shape first
            last = self.size() - 1
            from_before = self._own_rank == last or (self._own_rank != 0 and source == self._own_rank - 1)
            queue = self._answers.forward_shapes if from_before else self._answers.backward_shapes
            tensor.copy_(torch.tensor(queue.popleft()))
        return _done()

    def barrier(self, opts: Any = None) -> Work:
        return _done()


@contextmanager
def simulated_world(ledger: Ledger, answers: Answers, *, rank: int, world_size: int) -> Iterator[None]:
    """Makes this process rank `rank` of a simulated world while the block lasts."""
    _register_backend()
    _Creator.create = lambda options, _: SimulatedGroup(
        ledger, answers, options.global_ranks_in_group or range(world_size), options.group_rank, options.group_id
    )
    dist.init_process_group(_BACKEND, rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Creator:
    """The maker of the current world's groups: torch registers a backend for the whole process."""

    create: ClassVar[Callable[[Any, Any], SimulatedGroup]]


def _register_backend() -> None:
    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            _BACKEND,
            lambda options, more: _Creator.create(options, more),
            extended_api=True,
            devices=["cpu", "cuda"],
        )


def _is_list(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and tensor.dtype == torch.int64 and not isinstance(tensor, FakeTensor)


def _answer(tensor: Tensor, answers: deque[Tensor]) -> None:
    assert answers, "the simulated step asked for a value that its assumptions lack"
    value = answers.popleft()
    assert value.shape == tensor.shape, f"assumed {tuple(value.shape)}, asked for {tuple(tensor.shape)}"
    tensor.copy_(value)


def _done() -> Work:
    future: Future[None] = Future()
    future.set_result(None)
    return _create_work_from_future(future)
