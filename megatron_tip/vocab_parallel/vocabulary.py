"""The description of a sharded vocabulary, an argument of this package's functions."""

import math
from dataclasses import dataclass

from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel.kernel_choice import KERNEL_SETTINGS, KernelSetting


@dataclass(frozen=True)
class ShardedVocabulary:
    """A vocabulary sharded over a tensor-parallel group, and how distributions over it are computed.

    Every model's distribution is softmax(hidden headᵀ / temperature) over the real ids. All calls of a run can share
    one object; every rank of `tp_group` must pass the same values.

    Attributes:
        vocab_size: number of real ids; padded rows of the heads have probability zero. `None`: no padding.
        temperature: divides the logits of every model.
        tp_group: the group over which the heads are sharded in equal parts; `None`: not sharded.
        chunk_rows: rows whose logits exist at the same time; `None`: chosen from the shapes.
        kernels: what does the arithmetic on logits: "triton", "eager" (plain torch), "compiled" (torch.compile), or
            "auto": Triton on a GPU where it works, else eager.

    Raises:
        InputError: an invalid temperature, number of rows or name of kernels.
    """

    vocab_size: int | None = None
    temperature: float = 1.0
    tp_group: ProcessGroup | None = None
    chunk_rows: int | None = None
    kernels: KernelSetting = "auto"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"ShardedVocabulary: expected a finite temperature above 0, got {self.temperature}.")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise InputError(f"ShardedVocabulary: expected chunk_rows of at least 1, or None, got {self.chunk_rows}.")
        if self.kernels not in KERNEL_SETTINGS:
            expected = ", ".join(KERNEL_SETTINGS)
            raise InputError(f"ShardedVocabulary: expected kernels in {expected}, got {self.kernels!r}.")
