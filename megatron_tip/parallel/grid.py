"""The ranks of a world in one model's layout. Free of Megatron, so that a layout can be checked at once."""

from dataclasses import dataclass

import torch

from megatron_tip.errors import ConfigError


@dataclass(frozen=True)
class ModelGrid:
    """The place of each rank of the world in a model's tp x dp x pp grid; tp varies fastest, pp slowest.

    This is the order of Megatron's own default ("tp-cp-ep-dp-pp"): tensor-parallel ranks are neighbours.
    """

    tp_size: int
    pp_size: int
    dp_size: int

    @classmethod
    def over(cls, world_size: int, *, tp_size: int, pp_size: int, owner: str) -> "ModelGrid":
        """Returns the grid of `world_size` ranks; the data-parallel size follows.

        Raises:
            ConfigError: `world_size` is not a multiple of tp x pp. `owner` ("student", "teacher") names the model.
        """
        if world_size % (tp_size * pp_size):
            raise ConfigError(
                f"{owner}: expected a world size that is a multiple of tp {tp_size} x pp {pp_size} = "
                f"{tp_size * pp_size}, got {world_size}; start a different number of processes or change the {owner}'s "
                "tensor_parallel_size or pipeline_parallel_size"
            )
        return cls(tp_size, pp_size, world_size // (tp_size * pp_size))

    def __str__(self) -> str:
        """Returns the layout in words."""
        return f"tp {self.tp_size} x pp {self.pp_size} x dp {self.dp_size}"

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    def rank_at(self, *, tp: int, dp: int, pp: int) -> int:
        return tp + self.tp_size * (dp + self.dp_size * pp)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Returns (tp, dp, pp) of a global rank."""
        return rank % self.tp_size, rank // self.tp_size % self.dp_size, rank // (self.tp_size * self.dp_size)

    def ranks(self) -> torch.Tensor:
        """Returns the global ranks, `[pp, dp, tp]` int64."""
        return torch.arange(self.world_size).reshape(self.pp_size, self.dp_size, self.tp_size)
