"""The boundaries of a micro-batch's sequences, as Megatron's layers take them."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_model_config


def boundaries(model: torch.nn.Module, lengths: Sequence[int]) -> PackedSeqParams:
    """Returns the boundaries of packed sequences of `lengths` for the attention and the rotary embedding of `model`.

    They leave no gap: padding is a sequence of its own. With gaps, Transformer Engine would refuse flash attention.
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
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )
