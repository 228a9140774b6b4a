"""The account of what one rank does in a step: live bytes, traffic, arithmetic and host syncs, by phase."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

BUILD, BETWEEN = "build", "between"
"""The phase of set-up (models, optimizer, groups), and what happens between the phases of a step."""
EXCHANGE = "exchange"
"""The second part of the phase "teacher", with a peak of its own: rows go to the student's ranks."""


@dataclass
class Peak:
    """The most bytes that were live at once, and what they belonged to."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


@dataclass
class Work:
    """Arithmetic of a phase. `memory_bytes`: read and written by operations other than matrix products."""

    matrix_flops: float = 0
    memory_bytes: float = 0
    num_operations: float = 0


@dataclass(frozen=True)
class Route:
    """The class of a message. `group`: a label such as "tp"; `ranks`: who takes part; `peer`: of a message to one rank.

    `operation`: of torch.distributed, "all_reduce" for example.
    """

    phase: str
    operation: str
    group: str
    ranks: tuple[int, ...]
    peer: int | None = None


@dataclass
class Traffic:
    """Messages of one route. `num_bytes`: of the tensor that the operation fills, or of the one that is sent.

    That is: all-reduce, broadcast and send: the tensor; all-gather: all parts together; reduce-scatter: all parts
    together; gather: this rank's part; all-to-all: everything that this rank sends.
    """

    num_messages: float = 0
    num_bytes: float = 0


class Ledger:
    """The account of one rank. Every live storage counts once, for the purpose under which it was created.

    `left`: what lives at the end of each phase.
    """

    def __init__(self, rank: int = 0) -> None:
        """Opens an empty account of global rank `rank`."""
        self.rank = rank
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Peak] = defaultdict(Peak)
        self.left: dict[str, Counter[str]] = {}
        self.work: dict[str, Work] = defaultdict(Work)
        self.traffic: dict[Route, Traffic] = defaultdict(Traffic)
        self.host_syncs: Counter[str] = Counter()
        self.labels: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._phases = [BUILD]
        self._moment = ""
        self._purposes = ["other"]
        self.is_paused = False
        self._total = 0
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}

    @property
    def phase(self) -> str:
        return self._phases[-1]

    def end_build(self) -> None:
        """Ends the set-up: what follows outside of a step's phases is between them."""
        assert self._phases == [BUILD], "called once, outside of any phase"
        self._phases = [BETWEEN]

    def enter(self, phase: str) -> None:
        """Begins a phase, possibly within another one; a PhaseTimer's `on_enter`."""
        self._phases.append(phase)
        self._update_peak()

    def leave(self, *_: object) -> None:
        """Ends the phase; a PhaseTimer's `on_exit`."""
        self.left[self._phases.pop()] = self.live.copy()

    def begin_moment(self, name: str, purpose: str) -> None:
        """Gives what follows a peak of its own, and charges it to `purpose`, until `end_moment`; the phase goes on."""
        self._moment = name
        self._purposes.append(purpose)
        self._update_peak()

    def end_moment(self) -> None:
        """Ends what `begin_moment` began."""
        self._moment = ""
        self._purposes.pop()

    @contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """Charges what is created in the block to `name`."""
        self._purposes.append(name)
        try:
            yield
        finally:
            self._purposes.pop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing in the block, neither memory nor arithmetic."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor's storage from now on until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        num_bytes = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._free(key))
        purpose = self._purposes[-1]
        self._storages[key] = (reference, purpose, num_bytes)
        self._add(purpose, num_bytes)

    def operate(self, tensors: Sequence[Tensor]) -> None:
        """Counts an operation other than a matrix product, which reads or writes each of `tensors` once."""
        if self.is_paused:
            return
        work = self.work[self.phase]
        work.num_operations += 1
        work.memory_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def assign(self, purpose: str, tensors: Sequence[Tensor]) -> None:
        """Moves storages that are counted already, or not yet, to `purpose`."""
        for tensor in tensors:
            self.hold(tensor)
            key = id(tensor.untyped_storage())
            reference, former, num_bytes = self._storages[key]
            self._storages[key] = (reference, purpose, num_bytes)
            self.live[former] -= num_bytes
            self.live[purpose] += num_bytes

    def send(self, operation: str, group: str, tensors: Sequence[Tensor], *, peer: int | None = None) -> None:
        """Counts one message of `tensors` in the group of that name."""
        assert self.phase == BUILD or group in self.labels, f"a message in the unlabelled group {group} would be lost"
        label, ranks = self.labels.get(group, (group, ()))
        if peer is not None:
            ranks = (self.rank, peer)
        traffic = self.traffic[Route(self.phase, operation, label, ranks, peer)]
        traffic.num_messages += 1
        traffic.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _free(self, key: int) -> None:
        _, purpose, num_bytes = self._storages.pop(key)
        self._add(purpose, -num_bytes)

    def _add(self, purpose: str, num_bytes: int) -> None:
        self.live[purpose] += num_bytes
        self._total += num_bytes
        if num_bytes > 0:
            self._update_peak()

    def _update_peak(self) -> None:
        peak = self.peaks[self._moment or self.phase]
        if self._total > peak.total:
            peak.total = self._total
            peak.parts = {name: size for name, size in self.live.items() if size}
