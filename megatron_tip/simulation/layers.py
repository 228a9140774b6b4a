"""The account of a rank from models with few layers: where layers are alike, every cost grows by the same with each."""

from dataclasses import dataclass, replace

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.models import FoundModel
from megatron_tip.planning.plan import Outline
from megatron_tip.simulation.account import Account
from megatron_tip.simulation.assumptions import AssumedSelection
from megatron_tip.simulation.parts import ShapesOnly
from megatron_tip.simulation.rank import SimulatedRank, simulate_rank

FEW = 2
"""Layers of each stage in the smaller simulated models; the larger ones have one more.

The first layer of a stage is unlike the others: its input is not the output of a layer.
"""


@dataclass(frozen=True)
class CountedRank:
    """A rank's account for the whole models, its micro-batches in each pass, and the step's metrics."""

    account: Account
    num_taught: int
    num_scored: int
    num_trained: int
    metrics: dict[str, float]


def count_rank(
    config: Config,
    outline: Outline,
    rank: int,
    batch: StepBatch,
    assumed: AssumedSelection,
    *,
    metrics: dict[str, float] | None = None,
    gpu_memory_bytes: float = 0,
    by_layers: bool = True,
) -> CountedRank:
    """Returns the account of one rank; for the arguments see `simulate_rank`.

    Args:
        by_layers: False simulates whole models; else two pairs of models with few layers, if that is less work and the
            layers of each model are alike.
    """

    def simulate(student: int, teacher: int) -> SimulatedRank:
        shrunk = with_layers(config, outline, student, teacher)
        return simulate_rank(config, shrunk, rank, batch, assumed, metrics=metrics, gpu_memory_bytes=gpu_memory_bytes)

    student, teacher = _stage_layers(outline, rank)
    are_alike = by_layers and not any(map(_has_other_layers, (outline.student, outline.teaching)))
    if are_alike and student + teacher > 4 * FEW + 2:
        found = simulate(FEW, FEW)
        more = simulate(FEW + 1, FEW + 1)
        account = Account.of(found.ledger).with_layers(
            Account.of(more.ledger), student=student - FEW, teacher=teacher - FEW
        )
    else:
        found = simulate_rank(config, outline, rank, batch, assumed, metrics=metrics, gpu_memory_bytes=gpu_memory_bytes)
        account = Account.of(found.ledger)
    return CountedRank(account, found.num_taught, found.num_scored, found.num_trained, found.metrics)


def with_layers(config: Config, outline: Outline, student: int, teacher: int) -> Outline:
    """Returns the outline with models of that many layers in each stage; they have no weights."""
    dtypes, other = Dtypes.of(config), outline.teaching
    return replace(
        outline,
        student_grid=replace(outline.student_grid, pipeline_layers=()),
        teacher_grid=replace(outline.teacher_grid, pipeline_layers=()),
        student=ShapesOnly(_shrunk(outline.student, outline.student_grid, student), dtypes.student),
        teacher=ShapesOnly(_shrunk(other, outline.teacher_grid, teacher), dtypes.teacher),
    )


def _shrunk(model: FoundModel, grid: ModelGrid, stage_layers: int) -> ModelArchitecture:
    return replace(model.architecture, num_layers=stage_layers * grid.pp_size)


def _has_other_layers(model: FoundModel) -> bool:
    """Returns whether some layers of the model have experts and others do not."""
    experts = model.architecture.experts
    return experts is not None and bool(experts.dense_layers)


def _stage_layers(outline: Outline, rank: int) -> tuple[int, int]:
    models = ((outline.student, outline.student_grid), (outline.teaching, outline.teacher_grid))
    student, teacher = (_own_layers(model, grid, rank) for model, grid in models)
    return student, teacher


def _own_layers(model: FoundModel, grid: ModelGrid, rank: int) -> int:
    return len(grid.layers_of_stages(model.architecture.num_layers)[grid.coordinates(rank).pp])
