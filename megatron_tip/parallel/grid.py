"""The ranks of a world in one model's layout. Free of Megatron, so that a layout can be checked at once."""

from dataclasses import dataclass
from itertools import accumulate
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

    The experts of a model have a second grid over the same stages: `expert_tp_size` (0: `tp_size`) x `ep_size` x the
    rest, in this order. The ranks that share one copy of the experts may therefore belong to several replicas.

    `pipeline_layers`: the number of layers of each stage; empty: equally many.
    """

    tp_size: int
    pp_size: int
    dp_size: int
    cp_size: int = 1
    ep_size: int = 1
    expert_tp_size: int = 0
    pipeline_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_tp_size", self.expert_tp_size or self.tp_size)

    @classmethod
    def over(
        cls,
        world_size: int,
        *,
        tp_size: int,
        pp_size: int,
        owner: str,
        cp_size: int = 1,
        ep_size: int = 1,
        expert_tp_size: int = 0,
        pipeline_layers: tuple[int, ...] = (),
    ) -> "ModelGrid":
        """Returns the grid of `world_size` ranks; the data-parallel sizes follow.

        Raises:
            ConfigError: `world_size` is not a multiple of tp x cp x pp, or a stage's ranks not of the experts' tp x ep.
                `owner` ("student", "teacher") names the model.
        """
        replica_size = tp_size * cp_size * pp_size
        if world_size % replica_size:
            context = f"cp {cp_size} x " if cp_size > 1 else ""
            raise ConfigError(
                f"{owner}: expected a world size that is a multiple of tp {tp_size} x {context}pp {pp_size} = "
                f"{replica_size}, got {world_size}; start a different number of processes or change the {owner}'s "
                "tensor_parallel_size, context_parallel_size or pipeline_parallel_size"
            )
        grid = cls(tp_size, pp_size, world_size // replica_size, cp_size, ep_size, expert_tp_size, pipeline_layers)
        experts = grid.expert_tp_size * ep_size
        if grid.stage_size % experts:
            raise ConfigError(
                f"{owner}: expected a number of ranks per pipeline stage that is a multiple of the experts' tp "
                f"{grid.expert_tp_size} x ep {ep_size} = {experts}, got {grid.stage_size}; start a different number of "
                f"processes or change the {owner}'s expert_tensor_parallel_size or expert_model_parallel_size"
            )
        return grid

    @property
    def world_size(self) -> int:
        return self.tp_size * self.cp_size * self.dp_size * self.pp_size

    @property
    def stage_size(self) -> int:
        """The number of ranks of a pipeline stage, over all replicas."""
        return self.world_size // self.pp_size

    @property
    def expert_dp_size(self) -> int:
        """How many copies of the experts exist."""
        return self.stage_size // (self.expert_tp_size * self.ep_size)

    @property
    def splits_experts(self) -> bool:
        """Whether the experts are laid out differently from the other layers."""
        return (self.ep_size, self.expert_tp_size) != (1, self.tp_size)

    @property
    def replicas_share_experts(self) -> bool:
        """Whether a copy of the experts belongs to several replicas, which must then run in step."""
        return self.stage_size // self.dp_size % (self.expert_tp_size * self.ep_size) != 0

    def layers_of_stages(self, num_layers: int) -> list[range]:
        """Returns the layers of each pipeline stage of a model with `num_layers`, counted from 0."""
        ends = list(accumulate(self.pipeline_layers or [num_layers // self.pp_size] * self.pp_size))
        return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def stage_of(self, layer: int, num_layers: int) -> int:
        """Returns the pipeline stage of a layer."""
        return next(stage for stage, layers in enumerate(self.layers_of_stages(num_layers)) if layer in layers)

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

    def expert_coordinates(self, rank: int) -> tuple[int, int, int]:
        """Returns a global rank's places among the experts' tp, ep and dp ranks."""
        place = rank % self.stage_size
        return (
            place % self.expert_tp_size,
            place // self.expert_tp_size % self.ep_size,
            place // (self.expert_tp_size * self.ep_size),
        )

    def expert_ranks(self) -> torch.Tensor:
        """Returns the global ranks in the experts' grid, `[pp, expert dp, ep, expert tp]` int64."""
        shape = (self.pp_size, self.expert_dp_size, self.ep_size, self.expert_tp_size)
        return torch.arange(self.world_size).reshape(shape)

    def ranks(self) -> torch.Tensor:
        """Returns the global ranks, `[pp, dp, cp, tp]` int64."""
        return torch.arange(self.world_size).reshape(self.pp_size, self.dp_size, self.cp_size, self.tp_size)

    def sizes(self) -> dict[str, int]:
        """Returns the size of each dimension by name, as run folders and checkpoints record it.

        Those of the experts' grid are among them if it differs from the other layers'.
        """
        sizes = {"tp": self.tp_size, "pp": self.pp_size, "cp": self.cp_size, "dp": self.dp_size}
        return sizes | ({"expert_tp": self.expert_tp_size, "ep": self.ep_size} if self.splits_experts else {})

    def in_words(self) -> str:
        """Returns the layout for messages and tables; context parallelism only if there is any."""
        dense = {"tp": self.tp_size, "pp": self.pp_size, "cp": self.cp_size, "dp": self.dp_size}
        words = " x ".join(f"{name} {size}" for name, size in dense.items() if (name, size) != ("cp", 1))
        experts = f" (experts tp {self.expert_tp_size} x ep {self.ep_size} x dp {self.expert_dp_size})"
        stages = f" ({', '.join(map(str, self.pipeline_layers))} layers)"
        return words + (experts if self.splits_experts else "") + (stages if self.pipeline_layers else "")
