"""The ranks of a world in one model's layout. Free of Megatron, so that a layout can be checked at once."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_tip.errors import ConfigError


class Coordinates(NamedTuple):
    """A rank's place in each dimension of a grid."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class ModelGrid:
    """The place of each rank of the world in a model's tp x cp x dp x pp grid; tp varies fastest, pp slowest.

    This is the order of Megatron's own default ("tp-cp-ep-dp-pp"): tensor-parallel ranks are neighbours.
    """

    tp_size: int
    pp_size: int
    dp_size: int
    cp_size: int = 1

    @classmethod
    def over(cls, world_size: int, *, tp_size: int, pp_size: int, owner: str, cp_size: int = 1) -> "ModelGrid":
        """Returns the grid of `world_size` ranks; the data-parallel size follows.

        Raises:
            ConfigError: `world_size` is not a multiple of tp x cp x pp. `owner` ("student", "teacher") names the model.
        """
        replica_size = tp_size * cp_size * pp_size
        if world_size % replica_size:
            context = f"cp {cp_size} x " if cp_size > 1 else ""
            raise ConfigError(
                f"{owner}: expected a world size that is a multiple of tp {tp_size} x {context}pp {pp_size} = "
                f"{replica_size}, got {world_size}; start a different number of processes or change the {owner}'s "
                "tensor_parallel_size, context_parallel_size or pipeline_parallel_size"
            )
        return cls(tp_size, pp_size, world_size // replica_size, cp_size)

    @property
    def world_size(self) -> int:
        return self.tp_size * self.cp_size * self.dp_size * self.pp_size

    @property
    def sequence_multiple(self) -> int:
        """A divisor of the tokens of every sequence: context parallelism cuts each into 2 cp equal chunks."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def rank_at(self, *, tp: int, dp: int, pp: int, cp: int = 0) -> int:
        return tp + self.tp_size * (cp + self.cp_size * (dp + self.dp_size * pp))

    def coordinates(self, rank: int) -> Coordinates:
        """Returns the place of a global rank."""
        rest, tp = divmod(rank, self.tp_size)
        rest, cp = divmod(rest, self.cp_size)
        pp, dp = divmod(rest, self.dp_size)
        return Coordinates(tp, cp, dp, pp)

    def ranks(self) -> torch.Tensor:
        """Returns the global ranks, `[pp, dp, cp, tp]` int64."""
        return torch.arange(self.world_size).reshape(self.pp_size, self.dp_size, self.cp_size, self.tp_size)

    def sizes(self) -> dict[str, int]:
        """Returns the size of each dimension by name, as run folders and checkpoints record it."""
        return {"tp": self.tp_size, "pp": self.pp_size, "cp": self.cp_size, "dp": self.dp_size}

    def in_words(self) -> str:
        """Returns the sizes for messages and tables; that of context parallelism only if there is any."""
        return " x ".join(f"{name} {size}" for name, size in self.sizes().items() if (name, size) != ("cp", 1))
