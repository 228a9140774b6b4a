"""Final hidden states as rows, and their transfer from the teacher's ranks to the student's.

Shape letters: `s` tokens of a micro-batch, `h` hidden, `n` its valid tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Transfer:
    """A transfer of one micro-batch's hidden rows: `num_rows` rows from global rank `source` to `destination`."""

    replica: int
    micro_batch: int
    num_rows: int
    source: int
    destination: int


def plan_transfers(num_rows: list[list[int]], student: ModelGrid, teacher: ModelGrid) -> list[Transfer]:
    """Returns who sends which micro-batch's hidden rows to whom; a pure function, the same on every rank.

    Args:
        num_rows: valid tokens by student replica and micro-batch.

    Every tp rank of the student's last stage needs every row (its head shard covers other words, not other tokens).
    Each gets them from itself if it holds them, else from teacher tp ranks in turn, which spreads the load.
    """
    transfers = []
    for replica, rows_of_micro_batches in enumerate(num_rows):
        for micro_batch, rows in enumerate(rows_of_micro_batches):
            serving = teacher_replica(replica, micro_batch, len(rows_of_micro_batches), student, teacher)
            holders = [teacher.rank_at(tp=tp, dp=serving, pp=teacher.pp_size - 1) for tp in range(teacher.tp_size)]
            for tp in range(student.tp_size):
                destination = student.rank_at(tp=tp, dp=replica, pp=student.pp_size - 1)
                source = destination if destination in holders else holders[tp % len(holders)]
                transfers.append(Transfer(replica, micro_batch, rows, source, destination))
    return transfers


def teacher_replica(
    replica: int, micro_batch: int, num_micro_batches: int, student: ModelGrid, teacher: ModelGrid
) -> int:
    """Returns the teacher replica that serves a student replica's micro-batch.

    With equal data-parallel sizes it is the replica of the same number, so that equal layouts move no data. Otherwise
    the micro-batches, laid end to end, are cut into equal parts.
    """
    place = (replica + (micro_batch + 0.5) / num_micro_batches) / student.dp_size
    return int(place * teacher.dp_size)


def exchange(
    outgoing: Mapping[tuple[int, int], Tensor],
    incoming: Mapping[tuple[int, int], Tensor],
    transfers: list[Transfer],
) -> None:
    """Fills `incoming` with the rows that `transfers` send to this rank.

    Args:
        outgoing: `[n, h]` rows that this rank holds, by (replica, micro_batch).
        incoming: `[n, h]` buffers for the rows sent to this rank, by the same key; written to.

    Collectives: point-to-point over the world; every rank calls it with the same `transfers`.
    """
    rank = dist.get_rank()
    operations: list[dist.P2POp] = []
    for transfer in transfers:
        key = (transfer.replica, transfer.micro_batch)
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
