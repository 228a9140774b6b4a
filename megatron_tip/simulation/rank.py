"""One rank's step in a simulated world, and what it costs."""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.models.gpt import prepare_megatron
from megatron_tip.models.student import Student
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import Worker
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.passes import OnePass
from megatron_tip.planning.plan import Outline, RunPlan
from megatron_tip.records import Rollout
from megatron_tip.simulation.assumptions import STEP, AssumedSelection
from megatron_tip.simulation.experts import even_routing
from megatron_tip.simulation.ledger import Ledger
from megatron_tip.simulation.on_gpu import as_on_gpu, fuse_activations
from megatron_tip.simulation.parts import (
    Pipe,
    ShapesOnly,
    SimulatedSelector,
    SimulatedStudent,
    SimulatedTeacher,
    settings_of,
    with_receiver,
)
from megatron_tip.simulation.tensors import SimulatedTensors, reads_back
from megatron_tip.simulation.world import Answers, simulated_world
from megatron_tip.teachers.megatron import MegatronTeacher
from megatron_tip.teachers.own import AverageTeacher
from megatron_tip.teachers.setup import splits_sequence
from megatron_tip.training import weight_sync
from megatron_tip.training.checkpoints.student_state import complete_optimizer_state
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.setup import build_run
from megatron_tip.training.step import learn

_CPU = torch.device("cpu")
_NOTHING = b"\0" + json.dumps(None).encode()
"""What `together.run_on` sends of an action that returns None."""
_MEMORY = b"\0" + json.dumps(0.0).encode()
"""What it sends of the first rank's memory, by which a real run decides about one pass."""


@dataclass(frozen=True)
class SimulatedRank:
    """A rank after one simulated step: its account, its micro-batches in each pass, and the step's metrics."""

    rank: int
    ledger: Ledger
    num_taught: int
    num_scored: int
    num_trained: int
    metrics: dict[str, float]


def step_batch(config: Config, outline: Outline, rollouts: Sequence[Rollout]) -> StepBatch:
    """Returns the rollouts as every rank of the run would lay them out (`TrainingRun.batch_of`)."""
    student, teacher = outline.student_grid, outline.teacher_grid
    is_split = teacher.tp_size > 1 and splits_sequence(config, outline.teaching.architecture)
    return StepBatch.over(
        rollouts,
        dp_size=student.dp_size,
        max_tokens=config.training.max_tokens_per_micro_batch,
        pad_token_id=0,
        token_multiple=math.lcm(
            student.tp_size * student.cp_size if config.model.sequence_parallel else 1,
            teacher.tp_size * teacher.cp_size if is_split else 1,
        ),
        device=_CPU,
        sequence_multiple=math.lcm(student.sequence_multiple, teacher.sequence_multiple),
        cp_size=student.cp_size,
    )


def simulate_rank(
    config: Config,
    outline: Outline,
    rank: int,
    batch: StepBatch,
    assumed: AssumedSelection,
    *,
    metrics: dict[str, float] | None = None,
    gpu_memory_bytes: float = 0,
) -> SimulatedRank:
    """Returns one rank of the world after a step of `batch` and a sync of the weights.

    `gpu_memory_bytes`: above 0, logits are worked on as on a GPU of that memory; the tensors are always the CPU's.
    `assumed`: the selection in `batch`, which costs the same for all ranks. `metrics`: those of the step, which the
    last stage computes and sends; None: simulate that stage's first rank first.
    """
    ledger, answers = Ledger(rank), Answers()
    world_size = outline.student_grid.world_size
    parallel_state.destroy_global_memory_buffer()  # each rank makes its own
    prepare_megatron()
    world = simulated_world(ledger, answers, rank=rank, world_size=world_size)
    place = as_on_gpu(ledger, int(gpu_memory_bytes)) if gpu_memory_bytes else nullcontext()
    with world, place, even_routing(ledger), SimulatedTensors(ledger), reads_back(ledger):
        timer = PhaseTimer(_CPU, on_enter=ledger.enter, on_exit=ledger.leave)
        if rank != 0:
            answers.broadcasts.extend((_length(_MEMORY), _bytes(_MEMORY)))
        run = _build(config, outline, Worker(rank, world_size, 0, _CPU), timer)
        if gpu_memory_bytes:
            fuse_activations(run.student.model, _own_teacher(run).model)
        run = with_receiver(with_assumptions(run, ledger, answers, assumed), rank)
        with ledger.purpose("student: optimizer"):
            complete_optimizer_state(run.student)  # as every step but the first finds it
        ledger.end_build()
        with ledger.paused():  # what stands for the other ranks costs this one nothing
            _expect(run, assumed, answers, metrics)
        batch = replace(batch)  # each rank builds its own micro-batches
        found = learn(run, batch, STEP)
        answers.check_used()
        if rank != 0:
            answers.broadcasts.extend((_length(_NOTHING), _bytes(_NOTHING)))  # a server can take weights
        between_steps(run, ledger, batch)
        assert isinstance(run.student, SimulatedStudent)
        assert isinstance(run.teacher, SimulatedTeacher)
        return SimulatedRank(
            rank=rank,
            ledger=ledger,
            num_scored=run.student.num_run(assumed.scored),
            num_trained=run.student.num_run(assumed.trained),
            num_taught=run.teacher.num_run(batch),
            metrics=found,
        )


def _own_teacher(run: TrainingRun) -> MegatronTeacher:
    assert isinstance(run.teacher, MegatronTeacher), "checked by `plan`"
    return run.teacher


def between_steps(run: TrainingRun, ledger: Ledger, batch: StepBatch) -> None:
    """Runs what comes after a step: the sync, and the passes of a held-out measurement if the step has none like them.

    They take the step's `batch`.
    """
    with run.timer.phase("sync"), ledger.purpose("sync: gathered weights"):
        weight_sync.stream_weights(run, STEP)
    with run.timer.phase("rollout"):
        pass  # what stays on the device while rollouts are generated
    if run.config.heldout.num_prompts and not _scores_without_holding(run):
        with run.timer.phase("measure"):
            run.teacher.score(run.student, batch, run.teacher.ask(batch))


def _scores_without_holding(run: TrainingRun) -> bool:
    """Returns whether the step's own scoring stands for that of a held-out measurement."""
    scores = bool(run.selector.required_statistics or run.config.rollout.importance_cap)
    return scores and run.one_pass.max_tokens == 0


class _SimulatedPlan(RunPlan):
    """The plan of a worker without a device; `with_assumptions` says which batches take one pass."""

    @property
    def memory_bytes(self) -> float:
        return 0.0


def _build(config: Config, outline: Outline, worker: Worker, timer: PhaseTimer) -> TrainingRun:
    dtypes = Dtypes.of(config)
    models: dict[str, Any] = {
        "student": ShapesOnly(outline.student.architecture, dtypes.student),
        "teacher": ShapesOnly(outline.teaching.architecture, dtypes.teacher),
    }
    shapes = {one.name: getattr(outline, one.name) for one in fields(Outline)}
    values: dict[str, Any] = shapes | models | {"stop_token_ids": outline.stop_token_ids or (0,)}
    plan = _SimulatedPlan(**values)
    stays = config.training.model_copy(update={"offload": "none"})  # what leaves the device does not depend on values
    return build_run(config.model_copy(update={"training": stays}), plan, worker, timer, num_threads=1, generates=False)


def with_assumptions(run: TrainingRun, ledger: Ledger, answers: Answers, assumed: AssumedSelection) -> TrainingRun:
    """Returns the run with the simulated parts in place of its own, and labels what it has built."""
    student, teacher, selector = run.student, _own_teacher(run), run.selector
    label_groups(ledger, student.groups, teacher.groups)
    assign_purposes(ledger, student, teacher)
    simulated_student = SimulatedStudent(
        **settings_of(student, [one.name for one in fields(Student)]),
        ledger=ledger,
        pipe=Pipe(student.model, student.groups, run.architecture.hidden_size, answers),
        assumed=assumed,
    )
    simulated_teacher = SimulatedTeacher(
        **settings_of(teacher, [one.name for one in fields(MegatronTeacher)]),
        ledger=ledger,
        pipe=Pipe(teacher.model, teacher.groups, teacher.hidden_size, answers),
        assumed=assumed,
        own=teacher,
        remaining=[],
    )
    simulated_selector = SimulatedSelector(
        **settings_of(selector, [one.name for one in fields(selector)]),
        ledger=ledger,
        assumed=assumed,
        replica=student.groups.dp_rank,
    )
    one_pass = OnePass(sys.maxsize if assumed.takes_one_pass else 0, 1.0, selector.asked_share)
    return replace(
        run,
        student=simulated_student,
        teacher=simulated_teacher,
        selector=simulated_selector,
        one_pass=one_pass,
    )


def label_groups(ledger: Ledger, student: ModelGroups, teacher: ModelGroups) -> None:
    """Names the process groups as reports call them, with their ranks."""
    world = torch.distributed.group.WORLD
    assert world is not None, "the world exists while a rank is simulated"
    ledger.labels[world.group_name] = ("world", tuple(range(student.grid.world_size)))
    for prefix, groups in (("teacher ", teacher), ("", student)):
        for name, label in LABELS.items():
            group = getattr(groups.collection, name)
            if group is not None:
                ranks = tuple(torch.distributed.get_process_group_ranks(group))
                ledger.labels[group.group_name] = (prefix + label, ranks)


LABELS = {
    "cp": "cp",
    "ep": "ep",
    "tp_dp_cp": "a stage",
    "tp_ep_pp": "a copy of the experts",
    "tp_ep": "a stage's experts",
    "expt_dp": "expert dp",
    "expt_tp": "expert tp",
    "mp": "a copy of the model",
    "embd": "first and last stage",
    "dp_cp": "dp x cp",
    "tp_cp": "tp x cp",
    "dp": "dp",
    "pp": "pp",
    "tp": "tp",
}
"""Megatron's names of a model's groups, with those in reports; of a group with several names the last one holds."""


def assign_purposes(ledger: Ledger, student: Student, teacher: MegatronTeacher) -> None:
    """Charges what the set-up has built to its purposes."""
    weights = list(student.model.parameters())
    optimizer = [
        parameter
        for part in student.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
    ledger.assign("student: optimizer", optimizer)
    wrapped: Any = student.wrapped
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    ledger.assign("student: gradients", [buffer.grad_data for buffer in buffers])
    ledger.assign("student: weights", weights)
    tensors = teacher.tensors()  # none if it is the student
    ledger.assign("teacher: weights", tensors.get("teacher", []))
    ledger.assign("teacher: head", tensors.get("head", []))
    if isinstance(teacher, AverageTeacher):
        held = dict(teacher.model.named_parameters())  # in float32 they are the averages themselves
        averages = [average for name, average in teacher.averages.items() if average is not held[name]]
        ledger.assign("teacher: averages", averages)


def _expect(run: TrainingRun, assumed: AssumedSelection, answers: Answers, metrics: dict[str, float] | None) -> None:
    """Tells what the other ranks of the world will send during the step."""
    groups = run.student.groups
    if groups.is_last_stage and not assumed.takes_one_pass:
        answers.replicas.append(assumed.last_selected)
        if groups.dp_cp_group.size() > 1:
            answers.replicas.extend(assumed.arrivals(groups.dp_cp_rank))
    elif not groups.is_last_stage:
        # The last stage tells that it has selected.
        answers.broadcasts.extend((_length(_NOTHING), _bytes(_NOTHING), assumed.last_selected))
    reporter = groups.grid.rank_at(tp=0, dp=0, pp=groups.grid.pp_size - 1)
    if groups.rank != reporter:
        assert metrics is not None, "the reporting rank is simulated first"
        content = json.dumps(metrics).encode()
        answers.broadcasts.extend((_length(content), _bytes(content)))


def _length(content: bytes) -> torch.Tensor:
    return torch.tensor([len(content)], dtype=torch.int64)


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
