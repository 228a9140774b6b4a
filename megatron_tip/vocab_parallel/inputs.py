"""The two models' hidden states and head shards: what is accepted, and their logits chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel.partition import VocabPartition

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Bytes of one model's float32 logits of a chunk.
_CHUNK_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Inputs:
    """Checked arguments of a statistics or loss call; every check uses facts that all ranks of the group share.

    `hidden` and `head` hold student and teacher in that order, `[n, H]` and `[V_padded / tp, H]`.
    """

    hidden: tuple[Tensor, Tensor]
    head: tuple[Tensor, Tensor]
    labels: Tensor | None
    temperature: float
    partition: VocabPartition
    chunk_rows: int

    @classmethod
    def checked(
        cls,
        caller: str,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        *,
        labels: Tensor | None,
        vocab_size: int | None,
        temperature: float,
        tp_group: ProcessGroup | None,
        chunk_rows: int | None,
    ) -> Inputs:
        """The inputs of `caller`; raises InputError, before any collective, for those that do not fit together."""
        for name, (hidden, head) in (("student", student), ("teacher", teacher)):
            _check_model(f"{caller}: {name}", hidden, head)
        for what, index in (("hidden", 0), ("head", 1)):
            if student[index].shape[0] != teacher[index].shape[0]:
                raise InputError(
                    f"{caller}: expected student_{what} and teacher_{what} with equally many rows, got "
                    f"{student[index].shape[0]} and {teacher[index].shape[0]}; both models share rows and vocabulary shards."
                )
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"{caller}: expected a finite temperature above 0, got {temperature}.")
        if chunk_rows is not None and chunk_rows < 1:
            raise InputError(f"{caller}: expected chunk_rows of at least 1 or None, got {chunk_rows}.")
        n, shard_size = student[0].shape[0], student[1].shape[0]
        partition = VocabPartition.of_shard(shard_size, vocab_size, tp_group)
        _check_labels(caller, labels, n, partition.vocab_size, student[0].device)
        chunk_rows = chunk_rows or max(1, _CHUNK_BYTES // (4 * shard_size))
        hidden = (student[0].detach(), teacher[0].detach())
        head = (student[1].detach(), teacher[1].detach())
        return cls(hidden, head, labels, temperature, partition, min(chunk_rows, max(n, 1)))

    @property
    def num_rows(self) -> int:
        return self.hidden[0].shape[0]

    def chunks(self) -> Iterator[slice]:
        """Row ranges, the same on every rank; one empty range if there are no rows, so that collectives still match."""
        for start in range(0, max(self.num_rows, 1), self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, self.num_rows))

    def logits(self, model: int, rows: slice) -> Tensor:
        """`[c, v]` float32 logits of the real ids that this rank owns, divided by the temperature."""
        head = self.head[model][: self.partition.num_local]
        return (self.hidden[model][rows] @ head.T).float() / self.temperature


def _check_model(where: str, hidden: Tensor, head: Tensor) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise InputError(
            f"{where}_hidden and {where.split()[-1]}_head: expected [n, H] and [V_padded / tp, H] with the same H, got "
            f"{list(hidden.shape)} and {list(head.shape)}."
        )
    if hidden.dtype != head.dtype or hidden.dtype not in _DTYPES:
        raise InputError(
            f"{where}_hidden and {where.split()[-1]}_head: expected one dtype of float32, bfloat16, float16, got "
            f"{hidden.dtype} and {head.dtype}."
        )
    if hidden.device != head.device:
        raise InputError(f"{where}_hidden and its head: expected one device, got {hidden.device} and {head.device}.")


def _check_labels(caller: str, labels: Tensor | None, n: int, vocab_size: int, device: torch.device) -> None:
    if labels is None:
        return
    if labels.shape != (n,) or labels.dtype != torch.int64 or labels.device != device:
        raise InputError(
            f"{caller}: expected labels [{n}] int64 on {device}, got {list(labels.shape)} {labels.dtype} on {labels.device}."
        )
    if n and not (int(labels.min()) >= 0 and int(labels.max()) < vocab_size):
        raise InputError(
            f"{caller}: expected labels in [0, {vocab_size}), got {int(labels.min())} to {int(labels.max())}; "
            "pass only rows that have a label."
        )
