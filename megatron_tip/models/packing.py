"""The boundaries of a micro-batch's sequences, as Megatron's layers take them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_tip.batching.context_parts import token_owners


@dataclass
class Boundaries(PackedSeqParams):
    """The boundaries of packed sequences, and what `PackedAttention` needs of them, made once for all layers.

    `lengths`: of the whole sequences. `cp_size`, `cp_rank`: which part of each this rank holds. `like`: any parameter
    of the model, for type and device.
    """

    lengths: tuple[int, ...] = ()
    cp_size: int = 1
    cp_rank: int = 0
    like: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def chunks(self) -> tuple[int, int]:
        """This rank's chunks of each sequence, among 2 cp."""
        return self.cp_rank, 2 * self.cp_size - 1 - self.cp_rank

    @cached_property
    def places_in_parts(self) -> Tensor:
        """`[s]` int64: where each token of the micro-batch stands in the parts of all ranks, laid end to end."""
        return token_owners(self.lengths, self.cp_size).argsort(stable=True).argsort().to(self.like.device)

    def causal_mask(self, chunk_length: int, chunk: int) -> Tensor:
        """Returns what is added to the scores of a chunk's queries over all keys up to its end, `[queries, keys]`.

        It is a view: one mask in memory serves every chunk of the micro-batch in every layer.
        """
        start = self._most_before - chunk * chunk_length
        return self._widest_mask[:chunk_length, start : self._most_before + chunk_length]

    @property
    def _longest_chunk(self) -> int:
        return max(self.lengths) // (2 * self.cp_size)

    @property
    def _most_before(self) -> int:
        """The number of tokens before the later chunk of the longest sequence."""
        return self.chunks[1] * self._longest_chunk

    @cached_property
    def _widest_mask(self) -> Tensor:
        """Forbids query i to see keys more than i places after the chunk's first token, which has `_most_before`."""
        shape = (self._longest_chunk, self._most_before + self._longest_chunk)
        return self.like.new_full(shape, -torch.inf).triu(self._most_before + 1)


def boundaries(model: torch.nn.Module, lengths: Sequence[int], *, cp_size: int = 1, cp_rank: int = 0) -> Boundaries:
    """Returns the boundaries of packed sequences of `lengths` for the attention and the rotary embedding of `model`.

    They leave no gap: padding is a sequence of its own or ends one. With gaps, Transformer Engine would refuse flash
    attention. Under context parallelism, too, they are those of the whole sequences: the layers divide by cp.
    """
    # Transformer Engine's kernels read them on the GPU, local layers on the host: there, a copy from the GPU in each
    # layer would make the host wait for it.
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    if get_model_config(model).apply_rope_fusion:
        # Without pinned memory the host would wait for the copy, and so for all that the GPU has queued.
        starts = starts.pin_memory().to(torch.cuda.current_device(), non_blocking=True)
    # Exact: if the longest were as long as all together, the rotary embedding would count positions from the start of
    # the micro-batch instead of the sequence. Scores would be the same but for rounding.
    longest = max(lengths)
    return Boundaries(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
        cp_size=cp_size,
        cp_rank=cp_rank,
        like=next(model.parameters(), torch.empty(0)).detach(),
    )
