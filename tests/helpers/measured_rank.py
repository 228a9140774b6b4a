"""The same account of a real rank: a step on real tensors over real process groups, to check the simulated one."""

from collections.abc import Sequence

import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import Worker
from megatron_tip.planning.plan import plan_run
from megatron_tip.records import Rollout
from megatron_tip.simulation.assumptions import STEP
from megatron_tip.simulation.ledger import EXCHANGE, Ledger, Route, Traffic
from megatron_tip.simulation.parts import with_receiver
from megatron_tip.simulation.rank import between_steps, label_groups
from megatron_tip.simulation.tensors import CountedTensors
from megatron_tip.teachers.megatron import MegatronTeacher
from megatron_tip.training.checkpoints.student_state import complete_optimizer_state
from megatron_tip.training.setup import build_run
from megatron_tip.training.step import learn


def measure_rank(config: Config, worker: Worker, rollouts: Sequence[Rollout]) -> Ledger:
    """Returns the account of this worker's step on `rollouts` and of a sync of the weights. Collective."""
    ledger = Ledger(worker.rank)
    with CountedTensors(ledger):
        timer = PhaseTimer(worker.device, on_enter=ledger.enter, on_exit=ledger.leave)
        plan = plan_run(config, dist.get_world_size())
        run = build_run(config, plan, worker, timer, num_threads=1, generates=False)
        assert isinstance(run.teacher, MegatronTeacher), "a teacher behind servers has no rank"
        label_groups(ledger, run.student.groups, run.teacher.groups)
        run = with_receiver(run, worker.rank)
        complete_optimizer_state(run.student)  # as every step but the first finds it
        ledger.end_build()
        batch = run.batch_of(rollouts)
        learn(run, batch, STEP)
        between_steps(run, ledger, batch)
    return ledger


def peaks_of(ledger: Ledger) -> dict[str, int]:
    """Returns the peak of live bytes of each phase, of which the simulated one has more."""
    found: dict[str, int] = {}
    for phase, peak in ledger.peaks.items():
        name = {"update": "train", EXCHANGE: "teacher"}.get(phase, phase)
        found[name] = max(found.get(name, 0), peak.total)
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
