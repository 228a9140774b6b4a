"""What the functions of this package accept: two models' hidden states and head shards that fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError, NotFiniteError
from megatron_tip.vocab_parallel.chunks import LogitBuffer, default_chunk_rows
from megatron_tip.vocab_parallel.collectives import agree
from megatron_tip.vocab_parallel.partition import VocabPartition

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Model:
    """One model's `[n, H]` hidden states and this rank's `[V_padded / tp, H]` rows of its output layer, detached."""

    name: str
    hidden: Tensor
    head: Tensor

    @classmethod
    def checked(cls, name: str, hidden: Tensor, head: Tensor) -> Model:
        if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
            raise InputError(
                f"expected {name}_hidden [n, H] and {name}_head [V_padded / tp, H] with one H, got "
                f"{list(hidden.shape)} and {list(head.shape)}."
            )
        if hidden.dtype != head.dtype or hidden.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"expected {name}_hidden and {name}_head in one dtype of float32, bfloat16, float16, got "
                f"{hidden.dtype} and {head.dtype}; cast the hidden states."
            )
        if hidden.device != head.device:
            raise InputError(
                f"expected {name}_hidden and {name}_head on one device, got {hidden.device}, {head.device}."
            )
        return cls(name, hidden.detach(), head.detach())


@dataclass(frozen=True)
class Inputs:
    """Arguments that fit together, the same on all ranks of the partition's group but for the head shards."""

    where: str
    student: Model
    teacher: Model
    labels: Tensor | None
    partition: VocabPartition
    temperature: float
    chunk_rows: int

    @property
    def num_rows(self) -> int:
        return self.student.hidden.shape[0]

    @property
    def device(self) -> torch.device:
        return self.student.hidden.device

    def local_head(self, model: Model) -> Tensor:
        """`[v, H]` rows of the real ids that this rank owns."""
        return model.head[: self.partition.num_local]

    def logit_buffers(self) -> tuple[LogitBuffer, LogitBuffer]:
        """Memory for the logits of a chunk, student's and teacher's."""
        student, teacher = (
            LogitBuffer(self.local_head(model), self.chunk_rows, self.temperature)
            for model in (self.student, self.teacher)
        )
        return student, teacher

    def check_finite(self, values: Tensor) -> None:
        """Raises NotFiniteError if `values`, the same on all ranks, show that a rank's logits are not finite."""
        if not values.isfinite().all():
            rows = (~values.isfinite()).nonzero()[:8, 0].tolist()
            raise NotFiniteError(
                f"{self.where}: expected finite logits, got NaN or inf in rows {rows} (first 8): a head is not "
                "finite on some rank of tp_group, or its logits overflow."
            )


def checked_inputs(
    where: str,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    labels: Tensor | None,
    row_weights: Tensor | None,
    vocab_size: int | None,
    temperature: float,
    tp_group: ProcessGroup | None,
    chunk_rows: int | None,
) -> Inputs:
    """The arguments of function `where` as `Inputs`.

    Shapes, dtypes and settings, which all ranks share, are checked before the first collective; values, which a fault
    may have changed on one rank, after an exchange that lets all ranks stop together (one all-gather of 40 bytes).
    Raises InputError.
    """
    try:
        inputs = _fitting(where, student, teacher, labels, row_weights, vocab_size, temperature, tp_group, chunk_rows)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    not_finite = _not_finite(inputs, row_weights)
    problem = not_finite or problem_with_labels(labels, inputs.partition.vocab_size)
    error = NotFiniteError if not_finite else InputError
    sizes = {"rows": inputs.num_rows, "rows a chunk": inputs.chunk_rows, **inputs.partition.sizes}
    agree(where, problem, sizes, inputs.device, tp_group, error=error)
    return inputs


def _fitting(
    where: str,
    student_pair: tuple[Tensor, Tensor],
    teacher_pair: tuple[Tensor, Tensor],
    labels: Tensor | None,
    row_weights: Tensor | None,
    vocab_size: int | None,
    temperature: float,
    tp_group: ProcessGroup | None,
    chunk_rows: int | None,
) -> Inputs:
    student, teacher = Model.checked("student", *student_pair), Model.checked("teacher", *teacher_pair)
    n, shard_size = student.hidden.shape[0], student.head.shape[0]
    if teacher.hidden.shape[0] != n:
        raise InputError(f"expected teacher_hidden with the student's {n} rows, got {teacher.hidden.shape[0]}.")
    if teacher.head.shape[0] != shard_size:
        raise InputError(
            f"expected teacher_head with the student's {shard_size} rows, got {teacher.head.shape[0]}; pad both "
            "heads to one size and shard them over tp_group alike."
        )
    device = student.hidden.device
    if teacher.hidden.device != device:
        raise InputError(f"expected the teacher on the student's device {device}, got {teacher.hidden.device}.")
    check_temperature(temperature)
    if chunk_rows is not None and chunk_rows < 1:
        raise InputError(f"expected chunk_rows of at least 1, or None, got {chunk_rows}.")
    check_labels(labels, (n,), device)
    if row_weights is not None and (row_weights.shape != (n,) or row_weights.device != device):
        raise InputError(
            f"expected row_weights [{n}] on {device}, got {list(row_weights.shape)} on {row_weights.device}."
        )
    partition = VocabPartition.of_shard(shard_size, vocab_size, tp_group)
    chunk_rows = min(chunk_rows or default_chunk_rows(n, shard_size), max(n, 1))
    return Inputs(where, student, teacher, labels, partition, temperature, chunk_rows)


def _not_finite(inputs: Inputs, row_weights: Tensor | None) -> str | None:
    """Which values on this rank are not finite, or None."""
    for model in (inputs.student, inputs.teacher):
        if not model.hidden.isfinite().all():
            return f"expected finite {model.name}_hidden, got NaN or inf."
    if row_weights is not None and not row_weights.isfinite().all():
        return "expected finite row_weights, got NaN or inf."
    return None


def check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"expected a finite temperature above 0, got {temperature}.")


def check_labels(labels: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises InputError for labels of another shape, dtype or device; their values are for `problem_with_labels`."""
    if labels is not None and (tuple(labels.shape) != shape or labels.dtype != torch.int64 or labels.device != device):
        raise InputError(
            f"expected labels {list(shape)} torch.int64 on {device}, got {list(labels.shape)} {labels.dtype} on "
            f"{labels.device}."
        )


def problem_with_labels(labels: Tensor | None, vocab_size: int) -> str | None:
    if labels is None or labels.numel() == 0 or (labels.min() >= 0 and labels.max() < vocab_size):
        return None
    return (
        f"expected labels in [0, {vocab_size}), got {labels.min().item()} to {labels.max().item()}; pass only rows "
        "that have a label."
    )
