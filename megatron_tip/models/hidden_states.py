"""Final hidden states as rows, and their transfer from the teacher's ranks to the student's.

Shape letters: `s` tokens of a micro-batch, `h` hidden, `n` its valid tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_tip.parallel.groups import ModelGrid


def masked_rows(hidden_states: Tensor, mask: Tensor, *, tp_group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """Returns the hidden states where `mask` holds, `[n, h]`, in their order.

    Args:
        hidden_states: `[s, 1, h]`, or this rank's `[s/tp, 1, h]` under sequence parallelism.
        mask: `[s]` bool with n true entries.

    The incoming gradient must be complete on every tp rank (as `divergence_loss` gives it): under sequence parallelism
    each rank keeps its own part, without a further reduction.

    Collectives: one all-gather over `tp_group` under sequence parallelism, none otherwise.
    """
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=tp_group
        )
    return hidden_states.squeeze(1)[mask]


class Piece(NamedTuple):
    """The rows of a student replica's micro-batch that one cp rank of the student and one of the teacher both hold."""

    replica: int
    micro_batch: int
    student_cp: int
    teacher_cp: int


@dataclass(frozen=True)
class Transfer:
    """A transfer of hidden rows: the `num_rows` rows of `piece` from global rank `source` to `destination`."""

    piece: Piece
    num_rows: int
    source: int
    destination: int


def plan_transfers(
    num_rows: Sequence[Sequence[list[list[int]]]], student: ModelGrid, teacher: ModelGrid
) -> list[Transfer]:
    """Returns who sends which hidden rows to whom; a pure function, the same on every rank.

    Args:
        num_rows: valid tokens by student replica, micro-batch, student's and teacher's context-parallel rank.

    Every tp rank of the student's last stage needs every row of its part (its head shard covers other words, not other
    tokens). Each gets them from itself if it holds them, else from teacher tp ranks in turn, which spreads the load.
    """
    transfers = []
    for replica, micro_batches in enumerate(num_rows):
        for micro_batch, counts in enumerate(micro_batches):
            serving = teacher_replica(replica, micro_batch, len(micro_batches), student, teacher)
            for student_cp, teacher_cp in product(range(student.cp_size), range(teacher.cp_size)):
                piece = Piece(replica, micro_batch, student_cp, teacher_cp)
                rows = counts[student_cp][teacher_cp]
                transfers += _transfers_of(piece, rows, serving, student, teacher)
    return transfers


def _transfers_of(
    piece: Piece, num_rows: int, serving: int, student: ModelGrid, teacher: ModelGrid
) -> Iterator[Transfer]:
    """Yields the transfers of one piece, from the teacher's replica `serving` to the student's tp ranks."""
    place = {"cp": piece.teacher_cp, "dp": serving, "pp": teacher.pp_size - 1}
    holders = [teacher.rank_at(tp=tp, **place) for tp in range(teacher.tp_size)]
    for tp in range(student.tp_size):
        destination = student.rank_at(tp=tp, cp=piece.student_cp, dp=piece.replica, pp=student.pp_size - 1)
        source = destination if destination in holders else holders[tp % len(holders)]
        yield Transfer(piece, num_rows, source, destination)


def teacher_replica(
    replica: int, micro_batch: int, num_micro_batches: int, student: ModelGrid, teacher: ModelGrid
) -> int:
    """Returns the teacher replica that serves a student replica's micro-batch.

    With equal data-parallel sizes it is the replica of the same number, so that equal layouts move no data. Otherwise
    the micro-batches, laid end to end, are cut into equal parts.
    """
    place = (replica + (micro_batch + 0.5) / num_micro_batches) / student.dp_size
    return int(place * teacher.dp_size)


def exchange(outgoing: Mapping[Piece, Tensor], incoming: Mapping[Piece, Tensor], transfers: list[Transfer]) -> None:
    """Fills `incoming` with the rows that `transfers` send to this rank.

    Args:
        outgoing: `[n, h]` rows that this rank holds, by piece.
        incoming: `[n, h]` buffers for the rows sent to this rank, by piece; written to.

    Collectives: point-to-point over the world; every rank calls it with the same `transfers`.
    """
    rank = dist.get_rank()
    operations: list[dist.P2POp] = []
    for transfer in transfers:
        key = transfer.piece
        if transfer.num_rows == 0 or rank not in (transfer.source, transfer.destination):
            continue
        if transfer.source == transfer.destination:
            incoming[key].copy_(outgoing[key])
        elif transfer.source == rank:
            operations.append(dist.P2POp(dist.isend, outgoing[key].contiguous(), transfer.destination))
        else:
            operations.append(dist.P2POp(dist.irecv, incoming[key], transfer.source))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
