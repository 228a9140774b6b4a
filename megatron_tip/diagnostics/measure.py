"""Scores the student, as it is, on contexts: distributed like a training step, with the same kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.diagnostics.scores import column_names
from megatron_tip.errors import NotFiniteError
from megatron_tip.records import Rollout, TokenStatistics
from megatron_tip.teachers.megatron import Teacher
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.scoring import ask_teacher, micro_batch_statistics


@dataclass(frozen=True)
class FrozenContexts:
    """Contexts with what the teacher says of them, which never changes.

    `teacher_rows`: `[n, H]`, this replica's rows on the last stage; None elsewhere. `row_of`: `[all rows]` int64, the
    place of each replica's rows, one replica after the other, in the order of contexts and positions.
    """

    batch: StepBatch
    teacher_rows: Tensor | None
    row_of: list[Tensor]

    @property
    def num_rows(self) -> int:
        return self.batch.num_valid()


def freeze(run: TrainingRun, contexts: Sequence[Rollout]) -> FrozenContexts:
    """Asks the teacher once. Collective over the world."""
    batch = run.batch_of(contexts)
    teacher_rows = ask_teacher(run, batch)
    assert teacher_rows is None or isinstance(teacher_rows, Tensor), "the teacher at hand gives hidden states"
    indices = [batch.token_index(replica) for replica in range(run.student.groups.grid.dp_size)]
    num_positions = 1 + max((int(index.position.max()) for index in indices if len(index)), default=0)
    keys = torch.cat([index.keys(num_positions) for index in indices])
    places = torch.empty_like(keys)
    places[keys.argsort()] = torch.arange(len(keys), device=keys.device)
    return FrozenContexts(batch, teacher_rows, list(places.split([len(index) for index in indices])))


def score_supports(
    run: TrainingRun, frozen: FrozenContexts, support_sizes: Sequence[int]
) -> dict[int, TokenStatistics]:
    """Statistics of this replica's rows at each K, on the last stage; nothing elsewhere.

    One forward pass of the student without gradient, however many K; both heads are applied once a K.
    """
    groups, teacher = run.student.groups, run.teacher
    assert isinstance(teacher, Teacher), "checked by session.open_bank"
    micro_batches = frozen.batch.micro_batches(groups.dp_rank)
    hidden = frozen.teacher_rows
    teacher_parts = hidden.split(frozen.batch.num_rows()[groups.dp_rank]) if hidden is not None else ()
    parts: dict[int, list[TokenStatistics]] = {size: [] for size in support_sizes}

    def score(index: int, hidden_states: Tensor) -> None:
        for size, found in parts.items():
            try:
                statistics = micro_batch_statistics(
                    run, teacher, micro_batches[index], hidden_states, teacher_parts[index], support_size=size
                )
            except NotFiniteError:  # alike on all tp ranks; the others must not be left alone
                statistics = TokenStatistics.unknown(len(teacher_parts[index]), run.device)
            found.append(statistics)

    run.student.forward(micro_batches, score)
    return {size: TokenStatistics.concatenate(found) for size, found in parts.items() if found}


def gathered(
    run: TrainingRun, frozen: FrozenContexts, columns: dict[str, Tensor] | None, names: Sequence[str]
) -> Tensor:
    """`[rows, names]` float32 on the CPU, in the order of contexts and positions, equal on every rank.

    Args:
        columns: `[n]` by name, this replica's rows, on the last stage; None elsewhere.

    Collectives: 1 all-reduce over the world. Raises NotFiniteError, on every rank, for values that are not finite.
    """
    groups = run.student.groups
    matrix = torch.zeros(frozen.num_rows, len(names), device=run.device)
    if columns is not None and groups.tp_rank == 0:
        matrix[frozen.row_of[groups.dp_rank]] = torch.stack([columns[name].float() for name in names], dim=1)
    dist.all_reduce(matrix)
    if not matrix.isfinite().all():
        broken = [name for name, finite in zip(names, matrix.isfinite().all(dim=0).tolist(), strict=True) if not finite]
        raise NotFiniteError(f"diagnostics: expected finite statistics on the bank, got NaN or infinity in {broken}")
    return matrix.cpu()


def score_contexts(run: TrainingRun, frozen: FrozenContexts, support_sizes: Sequence[int]) -> dict[str, Tensor]:
    """All columns of `scores` for the student as it is, `[rows]` float32, equal on every rank. Collective."""
    scored = score_supports(run, frozen, support_sizes)
    names = column_names(support_sizes)
    columns = None
    if scored:
        columns = {name: _column(scored, name) for name in names}
    return dict(zip(names, gathered(run, frozen, columns, names).unbind(dim=1), strict=True))


def forward_kl(run: TrainingRun, frozen: FrozenContexts) -> Tensor:
    """`[rows]` float32: KL(teacher || student) in nats at each position, equal on every rank. Collective."""
    scored = score_supports(run, frozen, (1,))
    columns = {"forward_kl": _column(scored, "forward_kl")} if scored else None
    return gathered(run, frozen, columns, ["forward_kl"])[:, 0]


def _column(scored: dict[int, TokenStatistics], name: str) -> Tensor:
    statistic, _, size = name.rpartition("_k")
    if size.isdigit():
        return getattr(scored[int(size)], statistic)
    return getattr(next(iter(scored.values())), name)
