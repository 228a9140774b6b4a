"""What a rank and the servers beside it hold in device memory, phase by phase."""

import time
from typing import Any

import torch

from megatron_tip.models.host_copy import HostCopy, Movable
from megatron_tip.models.student import GradientBuffers, Student
from megatron_tip.parallel.together import run_on, together
from megatron_tip.planning.phases import OFFLOADED, PHASES
from megatron_tip.rollout.engine import RolloutEngine
from megatron_tip.teachers.teacher import Teacher


class DeviceMemory:
    """Mover of a run's parts between device and host, and of the servers' memory. Every rank has one.

    Afresh, the trainer's parts are on the device, and servers that give back memory have done so.

    Args:
        offload: the value of `training.offload`.
        moves_servers: whether servers give back their memory; the same on every rank.
    """

    def __init__(
        self, student: Student, teacher: Teacher[Any], device: torch.device, *, offload: str, moves_servers: bool
    ) -> None:
        tensors = teacher.tensors()
        parts: dict[str, Movable] = {
            "teacher": HostCopy(lambda: tensors.get("teacher", []), device),
            "head": HostCopy(lambda: tensors.get("head", []), device),
            "gradients": GradientBuffers(student.wrapped),
            "optimizer": HostCopy(student.optimizer_tensors, device),
        }
        self._device = device
        self._moves_servers = moves_servers
        self._parts = {name: part for name, part in parts.items() if name in OFFLOADED[offload]}
        self._phase = ""
        self._metrics: dict[str, float] = {}

    def enter(self, phase: str, engine: RolloutEngine | None) -> None:
        """Makes room for `phase`: first gives back what it does not need, then takes what it does.

        No rank takes memory before all servers, and no server before all ranks, have given theirs back. Collective over
        the world: one all-reduce, and with servers one broadcast, both between CPUs; none if nothing moves.

        Args:
            engine: in the first process; None elsewhere.

        Raises:
            TrainingError: a host has no memory for what leaves the device; on every rank.
        """
        if phase == self._phase or not (self._parts or self._moves_servers):
            return
        needed, self._phase = PHASES[phase], phase
        begin, moved = time.perf_counter(), 0
        with together(device=self._device):
            moved += sum(part.to_host() for name, part in self._parts.items() if name not in needed.trainer)
            if self._device.type == "cuda":  # what the allocator keeps for later is of no use to another process
                torch.cuda.empty_cache()
        if self._moves_servers:
            self._move_servers(needed.servers, engine)
        moved += sum(part.to_device() for name, part in self._parts.items() if name in needed.trainer)
        self._add(f"offload/{phase}_seconds", time.perf_counter() - begin)
        self._add(f"offload/{phase}_bytes", float(moved))

    def step_metrics(self) -> dict[str, float]:
        """Returns this rank's {"offload/<phase>_seconds", "offload/<phase>_bytes"} since the last call; both directions
        count, and waiting for servers and other ranks.
        """
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _move_servers(self, held: frozenset[str], engine: RolloutEngine | None) -> None:
        """Makes the servers hold `held`. A dead one may start only in a phase that leaves it room: all or a sync."""

        def move() -> None:
            assert engine is not None, "the engine lives in the first process"
            engine.hold_memory(held, may_start=self._phase in ("generate", "sync"))

        begin = time.perf_counter()
        run_on(0, move, device=self._device)
        self._add("offload/servers_seconds", time.perf_counter() - begin)

    def _add(self, name: str, value: float) -> None:
        self._metrics[name] = self._metrics.get(name, 0.0) + value
