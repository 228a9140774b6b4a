"""Scoring of the current student on contexts, distributed like a training step and with the same kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.diagnostics.scores import column_names
from megatron_tip.errors import NotFiniteError
from megatron_tip.records import Rollout, TeacherRows
from megatron_tip.statistics import TokenStatistics
from megatron_tip.teachers.teacher import score_micro_batches
from megatron_tip.training.run import TrainingRun


@dataclass(frozen=True)
class FrozenContexts:
    """Contexts with the teacher's output, which never changes.

    `teacher_rows`: of this rank's `n` rows, on the last stage; None elsewhere. `row_of`: by `dp_cp_rank`, int64 indices
    of a rank's rows in the order of contexts and positions over all ranks.
    """

    batch: StepBatch
    teacher_rows: TeacherRows | None
    row_of: list[Tensor]

    @property
    def num_rows(self) -> int:
        return self.batch.num_valid()


def freeze(run: TrainingRun, contexts: Sequence[Rollout]) -> FrozenContexts:
    """Returns the contexts with the teacher's output, computed once. Collective over the world."""
    batch = run.batch_of(contexts)
    indices = [batch.token_index(rank) for rank in range(run.student.groups.dp_cp_group.size())]
    num_positions = 1 + max((int(index.position.max()) for index in indices if len(index)), default=0)
    keys = torch.cat([index.keys(num_positions) for index in indices])
    places = torch.empty_like(keys)
    places[keys.argsort()] = torch.arange(len(keys), device=keys.device)
    return FrozenContexts(batch, run.teacher.ask(batch), list(places.split([len(index) for index in indices])))


def score_supports(
    run: TrainingRun, frozen: FrozenContexts, support_sizes: Sequence[int]
) -> dict[int, TokenStatistics]:
    """Returns the statistics of this rank's rows for each K, on the last stage; nothing elsewhere.

    Runs one forward pass of the student, without gradient, for all K, and applies both heads once per K. Statistics are
    NaN where the logits are not finite.
    """

    def score(hidden: Tensor, rows: TeacherRows, labels: Tensor) -> dict[int, TokenStatistics]:
        ask = run.teacher.statistics
        return {size: ask(run.student, hidden, rows, labels, support_size=size) for size in support_sizes}

    def unknown(rows: TeacherRows) -> dict[int, TokenStatistics]:
        return dict.fromkeys(support_sizes, TokenStatistics.unknown(len(rows), run.device))

    found = score_micro_batches(run.student, frozen.batch, frozen.teacher_rows, score, unknown)
    return {size: TokenStatistics.concatenate([part[size] for part in found]) for size in support_sizes if found}


def gathered(
    run: TrainingRun, frozen: FrozenContexts, columns: dict[str, Tensor] | None, names: Sequence[str]
) -> Tensor:
    """Returns `[rows, names]` float32 on the CPU, in the order of contexts and positions, the same on every rank.

    Args:
        columns: `[n]` by name, this rank's rows, on the last stage; None elsewhere.

    Collectives: 1 all-reduce over the world. Raises NotFiniteError, on every rank, for values that are not finite.
    """
    groups = run.student.groups
    matrix = torch.zeros(frozen.num_rows, len(names), device=run.device)
    if columns is not None and groups.tp_rank == 0:
        matrix[frozen.row_of[groups.dp_cp_rank]] = torch.stack([columns[name].float() for name in names], dim=1)
    dist.all_reduce(matrix)
    if not matrix.isfinite().all():
        broken = [name for name, finite in zip(names, matrix.isfinite().all(dim=0).tolist(), strict=True) if not finite]
        raise NotFiniteError(f"diagnostics: expected finite statistics on the bank, got NaN or infinity in {broken}")
    return matrix.cpu()


def score_contexts(run: TrainingRun, frozen: FrozenContexts, support_sizes: Sequence[int]) -> dict[str, Tensor]:
    """Returns all columns of `scores` for the current student, `[rows]` float32, the same on every rank. Collective."""
    scored = score_supports(run, frozen, support_sizes)
    names = column_names(support_sizes)
    columns = None
    if scored:
        columns = {name: _column(scored, name) for name in names}
    return dict(zip(names, gathered(run, frozen, columns, names).unbind(dim=1), strict=True))


def forward_kl(run: TrainingRun, frozen: FrozenContexts) -> Tensor:
    """Returns KL(teacher || student) per position in nats, `[rows]` float32, the same on every rank. Collective."""
    scored = score_supports(run, frozen, (1,))
    columns = {"forward_kl": _column(scored, "forward_kl")} if scored else None
    return gathered(run, frozen, columns, ["forward_kl"])[:, 0]


def _column(scored: dict[int, TokenStatistics], name: str) -> Tensor:
    statistic, _, size = name.rpartition("_k")
    if size.isdigit():
        return getattr(scored[int(size)], statistic)
    return getattr(next(iter(scored.values())), name)
