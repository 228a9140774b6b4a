"""The checked inputs of this package: matching hidden states and head shards of one or two models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.errors import InputError, NotFiniteError
from megatron_tip.vocab_parallel.chunks import Chunk, LogitBuffer, RowBlocks, default_chunk_rows, row_ranges
from megatron_tip.vocab_parallel.collectives import agree
from megatron_tip.vocab_parallel.kernel_choice import KernelSet, chosen_kernels, triton_problem
from megatron_tip.vocab_parallel.partition import VocabPartition
from megatron_tip.vocab_parallel.vocabulary import ShardedVocabulary

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

HiddenAndHead = tuple[Tensor, Tensor]
"""One model: its `[n, H]` hidden states and this rank's `[V_padded / tp, H]` rows of its output layer."""


@dataclass(frozen=True)
class Model:
    """One model's `[n, H]` hidden states and this rank's `[V_padded / tp, H]` rows of its output layer, detached."""

    name: str
    hidden: Tensor
    head: Tensor

    @classmethod
    def checked(cls, name: str, hidden: Tensor, head: Tensor) -> "Model":
        """Returns the model; raises InputError if the tensors do not match."""
        if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
            raise InputError(
                f"expected {name}_hidden [n, H] and {name}_head [V_padded / tp, H] with the same H, got "
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
    """Arguments that match each other and, except for the head shards, are the same on all ranks of the group.

    `models`: the student, and the teacher if its hidden states are known. `chunk_rows`: rows per chunk.
    """

    where: str
    models: tuple[Model, ...]
    vocabulary: ShardedVocabulary
    partition: VocabPartition
    chunk_rows: int
    kernels: KernelSet

    @property
    def num_rows(self) -> int:
        return self.models[0].hidden.shape[0]

    @property
    def device(self) -> torch.device:
        return self.models[0].hidden.device

    def local_head(self, model: Model) -> Tensor:
        """Returns the `[v, H]` rows of the real ids that this rank owns."""
        return model.head[: self.partition.num_local]

    def chunks(self) -> Iterator[Chunk]:
        """Yields all rows in chunks that reuse the same memory. Without rows, yields one empty chunk."""
        temperature, reads_bfloat16 = self.vocabulary.temperature, self.kernels == "triton"
        buffers = tuple(
            LogitBuffer(self.local_head(model), self.chunk_rows, temperature, reads_bfloat16=reads_bfloat16)
            for model in self.models
        )
        blocks = RowBlocks(self.chunk_rows, self.partition.num_local, self.device, kernels=self.kernels)
        for rows in row_ranges(self.num_rows, self.chunk_rows):
            pairs = zip(buffers, self.models, strict=True)
            logits = tuple(buffer.logits(model.hidden[rows]) for buffer, model in pairs)
            yield Chunk(rows, logits, buffers, blocks, self.partition)

    def check_finite(self, values: Tensor) -> None:
        """Raises NotFiniteError if `values`, which are equal on all ranks, are not finite."""
        if not values.isfinite().all():
            rows = (~values.isfinite()).nonzero()[:8, 0].tolist()
            raise NotFiniteError(
                f"{self.where}: expected finite logits, got NaN or inf in rows {rows} (first 8): a head is not "
                "finite on some rank of tp_group, or logits overflow."
            )


def checked_inputs(
    where: str,
    models: Sequence[HiddenAndHead],
    vocabulary: ShardedVocabulary,
    *,
    labels: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Inputs:
    """Checks the arguments of function `where` and returns them as `Inputs`.

    Shapes, dtypes and settings, which all ranks share, are checked before the first collective. Values may be wrong on
    one rank only, so one all-gather of 40 bytes shares the result of their check.

    Args:
        models: the student, or student and teacher.

    Raises:
        InputError: arguments do not match or are invalid.
        NotFiniteError: hidden states or weights on this rank are not finite.
        PeerError: another rank found an error in its values.
    """
    try:
        checked = tuple(Model.checked(name, *pair) for name, pair in zip(("student", "teacher"), models, strict=False))
        _check_fit(checked, labels, row_weights)
        n, shard_size = checked[0].hidden.shape[0], checked[0].head.shape[0]
        partition = VocabPartition.of_shard(shard_size, vocabulary.vocab_size, vocabulary.tp_group)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    device = checked[0].hidden.device
    chunk_rows = min(vocabulary.chunk_rows or default_chunk_rows(n, shard_size, device), max(n, 1))
    kernels = chosen_kernels(vocabulary.kernels, device)
    faults = _faults(checked, row_weights, labels, partition.vocab_size, kernels)
    sizes = {"rows": n, **partition.sizes, "rows per chunk": chunk_rows}
    if mask := agree(where, _as_mask(faults, device), sizes, vocabulary.tp_group):
        first = next(fault for number, fault in enumerate(faults) if mask >> number & 1)
        raise first.error(f"{where}: {first.message()}")
    return Inputs(where, checked, vocabulary, partition, chunk_rows, kernels)


def _check_fit(models: Sequence[Model], labels: Tensor | None, row_weights: Tensor | None) -> None:
    """Raises InputError for shapes and devices that do not match the student's."""
    student, *others = models
    n, shard_size, device = student.hidden.shape[0], student.head.shape[0], student.hidden.device
    for teacher in others:
        if teacher.hidden.shape[0] != n:
            raise InputError(f"expected teacher_hidden with the student's {n} rows, got {teacher.hidden.shape[0]}.")
        if teacher.head.shape[0] != shard_size:
            raise InputError(
                f"expected teacher_head with the student's {shard_size} rows, got {teacher.head.shape[0]}; pad both "
                "heads to the same size and shard both over tp_group."
            )
        if teacher.hidden.device != device:
            raise InputError(f"expected the teacher on the student's device {device}, got {teacher.hidden.device}.")
    if labels is not None and (labels.shape != (n,) or labels.dtype != torch.int64 or labels.device != device):
        raise InputError(
            f"expected labels [{n}] torch.int64 on {device}, got {list(labels.shape)} {labels.dtype} on "
            f"{labels.device}."
        )
    if row_weights is not None and (row_weights.shape != (n,) or row_weights.device != device):
        raise InputError(
            f"expected row_weights [{n}] on {device}, got {list(row_weights.shape)} on {row_weights.device}."
        )


@dataclass(frozen=True)
class _Fault:
    """What may be wrong on this rank: a bool, or a bool scalar on the device, and the error if it is."""

    is_met: Tensor | bool
    error: type[InputError]
    message: Callable[[], str]


def _faults(
    models: Sequence[Model], row_weights: Tensor | None, labels: Tensor | None, vocab_size: int, kernels: KernelSet
) -> list[_Fault]:
    """Returns the faults to look for, the most telling first. Does not wait for the device."""
    checked = [(f"{model.name}_hidden", model.hidden) for model in models]
    if row_weights is not None:
        checked.append(("row_weights", row_weights))
    faults = [_not_finite(name, values) for name, values in checked]
    if labels is not None:
        is_met = ((labels < 0) | (labels >= vocab_size)).any()
        faults.append(_Fault(is_met, InputError, lambda: _range_of(labels, vocab_size)))
    problem = triton_problem(models[0].hidden.device) if kernels == "triton" else None
    message = f'expected kernels that run on this device, got "triton": {problem}.'
    faults.append(_Fault(problem is not None, InputError, lambda: message))
    return faults


def _not_finite(name: str, values: Tensor) -> _Fault:
    return _Fault(~values.isfinite().all(), NotFiniteError, lambda: f"expected finite {name}, got NaN or inf.")


def _range_of(labels: Tensor, vocab_size: int) -> str:
    return (
        f"expected labels in [0, {vocab_size}), got {labels.min().item()} to {labels.max().item()}; pass only rows "
        "that have a label."
    )


def _as_mask(faults: Sequence[_Fault], device: torch.device) -> Tensor:
    """Returns an int64 scalar on the device: bit i stands for fault i."""
    bits = [torch.as_tensor(fault.is_met, device=device).long() << number for number, fault in enumerate(faults)]
    return torch.stack(bits).sum()
