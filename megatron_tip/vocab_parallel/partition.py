"""The partition of the vocabulary over the ranks of a tensor-parallel group."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tip.errors import InputError


def padded_vocab_size(vocab_size: int, tp_size: int, multiple_of: int = 1) -> int:
    """Returns the smallest size >= `vocab_size` that gives `tp_size` equal shards, each a multiple of `multiple_of`.

    Raises:
        InputError: an argument is below 1.
    """
    for name, value in (("vocab_size", vocab_size), ("tp_size", tp_size), ("multiple_of", multiple_of)):
        if value < 1:
            raise InputError(f"padded_vocab_size: expected {name} of at least 1, got {value}.")
    step = tp_size * multiple_of
    return -(-vocab_size // step) * step


# Takes a logit out of its distribution: below every logit, but finite to avoid inf - inf.
_HIDDEN = -1e30


@dataclass(frozen=True)
class VocabPartition:
    """The token ids that this rank owns. The ranks of `group` hold equal shards of the padded vocabulary.

    This rank's *real* ids are the half-open range from `vocab_start_index` to `vocab_end_index`. Ids from `vocab_size`
    up to `padded_vocab_size` are padding: no rank owns them, and their probability is zero. A rank's range may
    therefore be shorter than its shard, or empty. `group=None`: the vocabulary is not sharded.
    """

    vocab_size: int
    padded_vocab_size: int
    vocab_start_index: int
    vocab_end_index: int
    group: ProcessGroup | None = None

    @classmethod
    def of_shard(cls, shard_size: int, vocab_size: int | None, group: ProcessGroup | None) -> "VocabPartition":
        """Returns the partition in which each rank of `group` holds `shard_size` rows. No collective.

        `vocab_size=None` means no padding.

        Raises:
            InputError: `vocab_size` is not in [1, shard_size x tp size].
        """
        tp_size, tp_rank = (1, 0) if group is None else (group.size(), group.rank())
        padded = shard_size * tp_size
        vocab_size = padded if vocab_size is None else vocab_size
        if not 1 <= vocab_size <= padded:
            raise InputError(
                f"expected vocab_size of 1 to {padded} ({shard_size} rows per shard x tp size {tp_size}), got "
                f"{vocab_size}; pass the unpadded size, and this rank's own shard."
            )
        start = min(tp_rank * shard_size, vocab_size)
        return cls(vocab_size, padded, start, min(start + shard_size, vocab_size), group)

    @property
    def num_local(self) -> int:
        """Number of real ids that this rank owns."""
        return self.vocab_end_index - self.vocab_start_index

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that all ranks of the group must agree on, by their names in messages."""
        return {"real ids": self.vocab_size, "ids with padding": self.padded_vocab_size}

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return 0 if self.group is None else self.group.rank()

    def owned(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `[c, k]` float32 entries of `values` `[c, num_local]` at `ids`, zero if not owned, and which are."""
        columns, is_owned = self._columns(ids)
        if self.num_local == 0:
            return values.new_zeros(ids.shape, dtype=torch.float32), is_owned
        return torch.where(is_owned, values.gather(1, columns).float(), 0.0), is_owned

    def add_owned(self, values: Tensor, ids: Tensor, addend: Tensor) -> None:
        """Adds `[c, k]` `addend` in place to `values` `[c, num_local]` at the global `ids` that this rank owns."""
        columns, is_owned = self._columns(ids)
        if self.num_local:
            values.scatter_add_(1, columns, torch.where(is_owned, addend, 0.0).to(values.dtype))

    def hide(self, logits: Tensor, ids: Tensor) -> None:
        """Gives the global `ids` `[c, k]` that this rank owns probability zero in `[c, num_local]` `logits`."""
        self.add_owned(logits, ids, torch.full(ids.shape, _HIDDEN, device=ids.device))

    def _columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        columns = ids - self.vocab_start_index
        return columns.clamp(0, max(self.num_local - 1, 0)), (columns >= 0) & (columns < self.num_local)
