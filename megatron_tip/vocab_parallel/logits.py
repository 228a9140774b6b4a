"""Statistics for those who have only logits: `[..., V_padded / tp]`, this rank's shard, float32, bfloat16 or float16.

All take `vocab_size`, the number of real ids (`None`: no padding), `temperature`, which divides the logits, and
`tp_group`, over which they are sharded (`None`: not sharded). Results are float32 and equal on all ranks of the group.

The logits stay as they are: a chunk of rows at a time is copied in float32. Gradients flow to the logits; those of a
shard are complete. Collectives: 1 all-gather a chunk, 1 of 40 bytes a call; the backward pass goes through the chunks
again, 1 all-gather each. InputError for arguments that do not fit together and for logits that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import kernels, row_functions
from megatron_tip.vocab_parallel.chunks import RowBlocks, default_chunk_rows, row_ranges
from megatron_tip.vocab_parallel.collectives import agree
from megatron_tip.vocab_parallel.inputs import FLOAT_DTYPES, check_labels, check_temperature, problem_with_labels
from megatron_tip.vocab_parallel.normalisation import Normaliser
from megatron_tip.vocab_parallel.partition import VocabPartition
from megatron_tip.vocab_parallel.row_functions import RowValues
from megatron_tip.vocab_parallel.topk import exchange_topk


def vocab_parallel_entropy(
    vocab_parallel_logits: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """`[...]` entropy in nats; TIP Eq. 2 before its division by ln |V|."""
    shards = _shards("vocab_parallel_entropy", (vocab_parallel_logits,), None, vocab_size, temperature, tp_group)

    def entropy(chunk: _Chunk) -> RowValues:
        (z,) = chunk.models
        return row_functions.entropy(z, torch.empty_like(z), chunk.blocks, shards.partition)

    return _evaluate(shards, entropy)


def vocab_parallel_logprobs(
    vocab_parallel_logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """`[...]` log-probability of each of the `[...]` int64 `labels` in [0, vocab_size)."""
    shards = _shards("vocab_parallel_logprobs", (vocab_parallel_logits,), labels, vocab_size, temperature, tp_group)
    flat_labels = labels.reshape(-1)

    def logprobs(chunk: _Chunk) -> RowValues:
        return row_functions.logprobs(chunk.models[0], flat_labels[chunk.rows], chunk.blocks, shards.partition)

    return _evaluate(shards, logprobs)


def vocab_parallel_kl(
    from_vocab_parallel_logits: Tensor,
    to_vocab_parallel_logits: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """`[...]` KL(from || to) in nats: `(student, teacher)` for the reverse, `(teacher, student)` for the forward KL."""
    logits = from_vocab_parallel_logits, to_vocab_parallel_logits
    shards = _shards("vocab_parallel_kl", logits, None, vocab_size, temperature, tp_group)

    # Seen from the first distribution this is the reverse KL to the second, seen from the second the forward KL.
    def seen_from_first(chunk: _Chunk) -> RowValues:
        return row_functions.reverse_kl(chunk.models[0], chunk.models[1], chunk.blocks, shards.partition)

    def seen_from_second(chunk: _Chunk) -> RowValues:
        return row_functions.forward_kl(chunk.models[1], chunk.models[0], chunk.blocks, shards.partition)

    return _evaluate(shards, seen_from_first, seen_from_second)


@torch.no_grad()
def vocab_parallel_topk(
    vocab_parallel_logits: Tensor,
    support_size: int,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`[..., K]` global ids of the K most probable tokens, and their logprobs, descending, ties by lower id.

    K is `support_size`, or the size of the vocabulary if that is smaller. Without gradient.
    """
    if support_size < 1:
        raise InputError(f"vocab_parallel_topk: expected support_size of at least 1, got {support_size}.")
    shards = _shards("vocab_parallel_topk", (vocab_parallel_logits,), None, vocab_size, temperature, tp_group)
    support_size = min(support_size, shards.partition.vocab_size)
    all_ids, all_logprobs = [], []
    for chunk in shards.chunks():
        sums, groups = chunk.blocks.run(kernels.topk_sums, *chunk.models)
        sums, [(top, ids)] = exchange_topk(chunk.models, [groups], sums, support_size, shards.partition)
        all_ids.append(ids)
        all_logprobs.append(Normaliser.of(sums[..., :1], sums[..., 1:]).logprobs(top, 0))
    logprobs = torch.cat(all_logprobs)
    shards.check_finite(logprobs)
    shape = *shards.shape, support_size
    return torch.cat(all_ids).view(shape), logprobs.view(shape)


@dataclass(frozen=True)
class _Chunk:
    """Rows of logits: float32 copies over the temperature, `[c, v]` over the real ids that this rank owns."""

    rows: slice
    models: tuple[Tensor, ...]
    blocks: RowBlocks


@dataclass(frozen=True)
class _Shards:
    """Checked arguments: one or two models' local logits as `[n, V_padded / tp]`, and the shape of their rows."""

    where: str
    logits: tuple[Tensor, ...]
    shape: tuple[int, ...]
    partition: VocabPartition
    temperature: float
    chunk_rows: int

    def chunks(self) -> Iterator[_Chunk]:
        n, v, device = self.logits[0].shape[0], self.partition.num_local, self.logits[0].device
        memory = [torch.empty(self.chunk_rows, v, device=device) for _ in self.logits]
        blocks = RowBlocks(self.chunk_rows, v, device)
        for rows in row_ranges(n, self.chunk_rows):
            models = (
                torch.div(logits.detach()[rows, :v], self.temperature, out=copy[: rows.stop - rows.start])
                for logits, copy in zip(self.logits, memory, strict=True)
            )
            yield _Chunk(rows, tuple(models), blocks)

    def check_finite(self, values: Tensor) -> None:
        if not values.isfinite().all():
            raise InputError(
                f"{self.where}: expected finite logits, got NaN or inf on some rank of tp_group; tell padding by "
                "vocab_size."
            )


def _shards(
    where: str,
    logits: tuple[Tensor, ...],
    labels: Tensor | None,
    vocab_size: int | None,
    temperature: float,
    tp_group: ProcessGroup | None,
) -> _Shards:
    first = logits[0]
    for shard in logits:
        if shard.dim() < 1 or shard.shape != first.shape or shard.device != first.device:
            raise InputError(
                f"{where}: expected logits [..., V_padded / tp] of one shape on one device, got "
                f"{[f'{list(s.shape)} on {s.device}' for s in logits]}."
            )
        if shard.dtype not in FLOAT_DTYPES:
            raise InputError(f"{where}: expected float32, bfloat16 or float16 logits, got {shard.dtype}.")
    shape = tuple(first.shape[:-1])
    try:
        check_temperature(temperature)
        check_labels(labels, shape, first.device)
        partition = VocabPartition.of_shard(first.shape[-1], vocab_size, tp_group)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    rows = [shard.reshape(-1, first.shape[-1]) for shard in logits]
    n = rows[0].shape[0]
    chunk_rows = min(default_chunk_rows(n, first.shape[-1]), max(n, 1))
    sizes = {"rows": n, "rows a chunk": chunk_rows, **partition.sizes}
    agree(where, problem_with_labels(labels, partition.vocab_size), sizes, first.device, tp_group)
    return _Shards(where, tuple(rows), shape, partition, temperature, chunk_rows)


def _evaluate(shards: _Shards, *functions: Callable[[_Chunk], RowValues]) -> Tensor:
    """The values of the first function, with the gradient of the i-th with respect to the i-th model's logits."""
    return _RowFunction.apply(shards, functions, *shards.logits).view(shards.shape)


class _RowFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shards: _Shards, functions: tuple[Callable[[_Chunk], RowValues], ...], *logits: Tensor
    ) -> Tensor:
        ctx.shards, ctx.functions = shards, functions
        ctx.save_for_backward(*logits)  # nothing is copied; autograd notices if somebody writes into them
        values = torch.cat([functions[0](chunk).values for chunk in shards.chunks()])
        shards.check_finite(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Any, ...]:
        (grad_values,) = grad_outputs
        shards, v = ctx.shards, ctx.shards.partition.num_local
        grads: list[Tensor | None] = []
        for logits, function, wanted in zip(ctx.saved_tensors, ctx.functions, ctx.needs_input_grad[2:], strict=True):
            grad = torch.zeros_like(logits) if wanted else None
            if grad is not None:
                for chunk in shards.chunks():
                    grad[chunk.rows, :v] = function(chunk).gradient(grad_values[chunk.rows] / shards.temperature)
            grads.append(grad)
        return None, None, *grads
