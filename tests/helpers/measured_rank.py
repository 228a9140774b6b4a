"""The same account of a real rank: a step on real tensors over real process groups, to check the simulated one."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.models import host_copy
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import Worker
from megatron_tip.planning.plan import plan_run
from megatron_tip.records import Rollout
from megatron_tip.simulation.assumptions import STEP
from megatron_tip.simulation.ledger import BETWEEN, EXCHANGE, Ledger, Route, Traffic
from megatron_tip.simulation.parts import with_receiver
from megatron_tip.simulation.rank import between_steps, label_groups
from megatron_tip.simulation.tensors import CountedTensors
from megatron_tip.teachers.megatron import MegatronTeacher
from megatron_tip.training.checkpoints.student_state import complete_optimizer_state
from megatron_tip.training.setup import build_run
from megatron_tip.training.step import learn


class DeviceLedger(Ledger):
    """The account of a rank whose parts leave its device, although host and device are the same memory here."""

    def put_apart(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts nothing of a tensor, which is in host memory, now and later."""
        storage = tensor.untyped_storage()
        self._storages[id(storage)] = (weakref.ref(storage), _HOST, 0)
        return tensor

    def following(self, move: Callable[..., None]) -> Callable[..., None]:
        """Returns `move`, after which storages count by their new size: Megatron frees gradients in place."""

        def moved(*arguments: Any) -> None:
            move(*arguments)
            for key, (reference, purpose, num_bytes) in list(self._storages.items()):
                storage = reference()
                if storage is not None and purpose != _HOST and storage.nbytes() != num_bytes:
                    self._storages[key] = (reference, purpose, storage.nbytes())
                    self._add(purpose, storage.nbytes() - num_bytes)

        return moved


_HOST = "host"


def measure_rank(config: Config, worker: Worker, rollouts: Sequence[Rollout]) -> tuple[Ledger, dict[str, float]]:
    """Returns the account of this worker's step on `rollouts` and of a sync of the weights, and the bytes that entered
    or left the device, by phase of `planning.phases.PHASES`. Collective.
    """
    ledger = DeviceLedger(worker.rank)
    with CountedTensors(ledger), _host_apart(ledger):
        timer = PhaseTimer(worker.device, on_enter=ledger.enter, on_exit=ledger.leave)
        plan = plan_run(config, dist.get_world_size())
        run = build_run(config, plan, worker, timer, num_threads=1, generates=False)
        assert isinstance(run.teacher, MegatronTeacher), "a teacher behind servers has no rank"
        label_groups(ledger, run.student.groups, run.teacher.groups)
        run = with_receiver(run, worker.rank)
        complete_optimizer_state(run.student)  # as every step but the first finds it
        ledger.end_build()
        run.memory.enter = ledger.following(run.memory.enter)
        run.enter("generate")  # as every step but the first finds the device
        run.memory.step_metrics()
        batch = run.batch_of(rollouts)
        learn(run, batch, STEP)
        run.enter("sync")
        moved = run.memory.step_metrics()
        between_steps(run, ledger, batch)
    moved = {name: value for name, value in moved.items() if name.endswith("_bytes")}
    return ledger, {name.removeprefix("offload/").removesuffix("_bytes"): value for name, value in moved.items()}


@contextmanager
def _host_apart(ledger: DeviceLedger) -> Iterator[None]:
    """Counts what leaves the device as none of its memory, although here both are a CPU's."""
    plain = host_copy.host_buffer

    def uncounted(num_bytes: int, device: torch.device) -> torch.Tensor:
        with ledger.paused():
            buffer = plain(num_bytes, device)
        return ledger.put_apart(buffer)

    host_copy.host_buffer = uncounted
    try:
        yield
    finally:
        host_copy.host_buffer = plain


def by_phase(peaks: dict[str, int]) -> dict[str, int]:
    """Returns the peaks of the phases that a real run has, of which the simulated one has more.

    Between phases parts leave and enter the device, one after the other, which takes no more than the phases beside.
    """
    found: dict[str, int] = {}
    for phase, num_bytes in peaks.items():
        if phase == BETWEEN:
            continue
        name = {"update": "train", EXCHANGE: "teacher"}.get(phase, phase)
        found[name] = max(found.get(name, 0), num_bytes)
    return found


def traffic_of(ledger: Ledger) -> dict[tuple[str, str, str, int | None], tuple[float, float]]:
    """Returns (messages, bytes) by phase, operation, group and peer, of groups of several ranks.

    Left out: the set-up, and the step's metrics, whose text has as many bytes as their digits.
    """
    found: dict[tuple[str, str, str, int | None], Traffic] = {}
    for route, traffic in ledger.traffic.items():
        if len(route.ranks) < 2 or route.phase == "build" or _is_metrics(route):
            continue
        phase = "train" if route.phase == "update" else route.phase
        total = found.setdefault((phase, route.operation, route.group, route.peer), Traffic())
        total.num_messages += traffic.num_messages
        total.num_bytes += traffic.num_bytes
    return {key: (total.num_messages, total.num_bytes) for key, total in found.items()}


def _is_metrics(route: Route) -> bool:
    return (route.phase, route.operation, route.group) == ("train", "broadcast", "world")
