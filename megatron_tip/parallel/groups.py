"""The process groups of one model: student and teacher each have their own grid over the same ranks.

Nothing here touches `megatron.core.parallel_state`; models, schedules and the optimizer get the groups handed in.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tip.errors import ConfigError


@dataclass(frozen=True)
class ModelGrid:
    """Where each rank of the world stands in a model's tp x dp x pp grid; tp varies fastest, pp slowest.

    This is the order of Megatron's own default ("tp-cp-ep-dp-pp"): tensor-parallel ranks are neighbours.
    """

    tp_size: int
    pp_size: int
    dp_size: int

    @classmethod
    def over(cls, world_size: int, *, tp_size: int, pp_size: int, owner: str) -> "ModelGrid":
        """The grid of `world_size` ranks; the data-parallel size is what remains.

        Raises:
            ConfigError: `world_size` is no multiple of tp x pp. `owner` ("student", "teacher") names the model.
        """
        if world_size % (tp_size * pp_size):
            raise ConfigError(
                f"{owner}: expected a world size that is a multiple of tp {tp_size} x pp {pp_size} = "
                f"{tp_size * pp_size}, got {world_size}; start another number of processes or change the {owner}'s "
                "tensor_parallel_size or pipeline_parallel_size"
            )
        return cls(tp_size, pp_size, world_size // (tp_size * pp_size))

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    def rank_at(self, *, tp: int, dp: int, pp: int) -> int:
        return tp + self.tp_size * (dp + self.dp_size * pp)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, dp, pp) of a global rank."""
        return rank % self.tp_size, rank // self.tp_size % self.dp_size, rank // (self.tp_size * self.dp_size)

    def ranks(self) -> torch.Tensor:
        """`[pp, dp, tp]` int64: the global ranks."""
        return torch.arange(self.world_size).reshape(self.pp_size, self.dp_size, self.tp_size)


@dataclass(frozen=True)
class ModelGroups:
    """This rank's process groups in one model's grid."""

    grid: ModelGrid
    collection: ProcessGroupCollection
    rank: int

    @property
    def tp_rank(self) -> int:
        return self.grid.coordinates(self.rank)[0]

    @property
    def dp_rank(self) -> int:
        return self.grid.coordinates(self.rank)[1]

    @property
    def pp_rank(self) -> int:
        return self.grid.coordinates(self.rank)[2]

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.grid.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's own pipeline."""
        return self.grid.rank_at(tp=self.tp_rank, dp=self.dp_rank, pp=self.grid.pp_size - 1)

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return self.collection.dp

    @property
    def model_group(self) -> dist.ProcessGroup:
        """All ranks that hold a part of this rank's replica (tp x pp)."""
        return self.collection.mp


def build_groups(grid: ModelGrid) -> ModelGroups:
    """This rank's groups in `grid`. Collective: every rank of the world calls it, with the same grid."""
    assert grid.world_size == dist.get_world_size(), f"{grid} does not fill a world of {dist.get_world_size()}"
    rank = dist.get_rank()
    ranks = grid.ranks()
    stages = [0] if grid.pp_size == 1 else [0, grid.pp_size - 1]
    tp_group = _subgroup(ranks.reshape(-1, grid.tp_size))
    pp_group = _subgroup(ranks.permute(1, 2, 0).reshape(-1, grid.pp_size))
    dp_group = _subgroup(ranks.permute(0, 2, 1).reshape(-1, grid.dp_size))
    model_group = _subgroup(ranks.permute(1, 0, 2).reshape(grid.dp_size, -1))
    tp_dp_group = _subgroup(ranks.reshape(grid.pp_size, -1))
    embedding_group = _subgroup(ranks[stages].permute(1, 2, 0).reshape(-1, len(stages)))
    self_group = _subgroup(ranks.reshape(-1, 1))  # context parallelism of size 1: Megatron wants a group all the same
    collection = ProcessGroupCollection(
        tp=tp_group,
        pp=pp_group,
        dp=dp_group,
        mp=model_group,
        cp=self_group,
        tp_cp=tp_group,
        dp_cp=dp_group,
        intra_dp_cp=dp_group,
        tp_dp_cp=tp_dp_group,
        embd=embedding_group,
        pos_embd=None,
        ep=self_group,
        expt_tp=tp_group,
        expt_dp=dp_group,
        intra_expt_dp=dp_group,
        tp_ep=tp_group,
        tp_ep_pp=model_group,
        inter_dist_opt=None,
        # Megatron: all ranks that together hold one copy of the optimizer's state; the whole world here.
        intra_dist_opt=dist.group.WORLD,
    )
    return ModelGroups(grid, collection, rank)


def _subgroup(rows: torch.Tensor) -> dist.ProcessGroup | None:
    """The group of this rank among `rows` `[groups, size]`; None on a rank that is in none of them."""
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    return group
