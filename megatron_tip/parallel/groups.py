"""The process groups of one model. Student and teacher each have their own grid over the same ranks.

Nothing here uses `megatron.core.parallel_state`: models, schedules and the optimizer are passed their groups.
"""

import datetime
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tip.parallel.grid import ModelGrid


@dataclass(frozen=True)
class ModelGroups:
    """This rank's process groups in one model's grid."""

    grid: ModelGrid
    collection: ProcessGroupCollection
    rank: int

    @property
    def tp_rank(self) -> int:
        return self.grid.coordinates(self.rank).tp

    @property
    def cp_rank(self) -> int:
        return self.grid.coordinates(self.rank).cp

    @property
    def dp_rank(self) -> int:
        return self.grid.coordinates(self.rank).dp

    @property
    def dp_cp_rank(self) -> int:
        """The place among the ranks that hold different rows: replica by replica, each with its cp ranks."""
        return self.dp_rank * self.grid.cp_size + self.cp_rank

    @property
    def pp_rank(self) -> int:
        return self.grid.coordinates(self.rank).pp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.grid.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """The global rank of the last stage in this rank's own pipeline."""
        last = self.grid.pp_size - 1
        return self.grid.rank_at(tp=self.tp_rank, cp=self.cp_rank, dp=self.dp_rank, pp=last)

    @property
    def expert_tp_rank(self) -> int:
        return self.grid.expert_coordinates(self.rank)[0]

    @property
    def ep_rank(self) -> int:
        return self.grid.expert_coordinates(self.rank)[1]

    @property
    def expert_dp_rank(self) -> int:
        return self.grid.expert_coordinates(self.rank)[2]

    @property
    def holds_first_copy(self) -> bool:
        """Whether this rank has a part of the first copy of the model or of the first copy of the experts."""
        return self.dp_cp_rank == 0 or (self.grid.splits_experts and self.expert_dp_rank == 0)

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """The ranks that hold the other parts of this rank's sequences; itself alone without context parallelism."""
        return self.collection.cp

    @property
    def tp_cp_group(self) -> dist.ProcessGroup:
        """The ranks of this rank's stage and replica."""
        return self.collection.tp_cp

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The ranks with the same part of the model and of each sequence, one per replica."""
        return self.collection.dp

    @property
    def ep_group(self) -> dist.ProcessGroup:
        """The ranks among which the experts are distributed."""
        return self.collection.ep

    @property
    def expert_tp_group(self) -> dist.ProcessGroup:
        """The ranks that share each expert."""
        return self.collection.expt_tp

    @property
    def dp_cp_group(self) -> dist.ProcessGroup:
        """The ranks with the same part of the model, in the order of `dp_cp_rank`: gradients are summed over them."""
        return self.collection.dp_cp

    @property
    def model_group(self) -> dist.ProcessGroup:
        """All ranks that together hold one copy of the model, this rank's (tp x pp)."""
        return self.collection.mp


def build_groups(grid: ModelGrid, *, timeout_seconds: float | None = None) -> ModelGroups:
    """Creates this rank's groups in `grid`. Collective: every rank of the world calls it, with the same grid.

    Args:
        timeout_seconds: of their collectives; None: torch's.
    """
    assert grid.world_size == dist.get_world_size(), f"{grid} does not fill a world of {dist.get_world_size()}"
    rank = dist.get_rank()
    ranks = grid.ranks()
    timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
    # A group for tensors between CPUs is a mesh of connections: only data parallelism needs one, for checkpoints.
    backend = "nccl" if "nccl" in dist.get_backend_config() else None
    subgroup = partial(_subgroup, timeout=timeout, backend=backend)
    stages = [0] if grid.pp_size == 1 else [0, grid.pp_size - 1]
    tp_group = subgroup(ranks.reshape(-1, grid.tp_size))
    pp_group = subgroup(ranks.permute(1, 2, 3, 0).reshape(-1, grid.pp_size))
    rows_group = _subgroup(  # of the ranks that hold different rows
        ranks.permute(0, 3, 1, 2).reshape(-1, grid.dp_size * grid.cp_size), timeout=timeout, backend=None
    )
    model_group = subgroup(ranks.permute(1, 2, 0, 3).reshape(grid.dp_size * grid.cp_size, -1))
    stage_group = subgroup(ranks.reshape(grid.pp_size, -1))
    embedding_group = subgroup(ranks[stages].permute(1, 2, 3, 0).reshape(-1, len(stages)))
    self_group = subgroup(ranks.reshape(-1, 1))  # Megatron needs a group also for a size of 1
    cp_group, dp_group, tp_cp_group = self_group, rows_group, tp_group
    if grid.cp_size > 1:
        cp_group = subgroup(ranks.transpose(2, 3).reshape(-1, grid.cp_size))
        dp_group = subgroup(ranks.permute(0, 2, 3, 1).reshape(-1, grid.dp_size))
        tp_cp_group = subgroup(ranks.reshape(-1, grid.cp_size * grid.tp_size))
    experts = {
        "ep": self_group,
        "expt_tp": tp_group,
        "expt_dp": rows_group,
        "intra_expt_dp": rows_group,
        "tp_ep": tp_group,
        "tp_ep_pp": model_group,
    }
    if grid.splits_experts:
        experts = _expert_groups(grid, timeout=timeout, backend=backend)
    collection = ProcessGroupCollection(
        tp=tp_group,
        pp=pp_group,
        dp=dp_group,
        mp=model_group,
        cp=cp_group,
        tp_cp=tp_cp_group,
        dp_cp=rows_group,
        intra_dp_cp=rows_group,
        tp_dp_cp=stage_group,
        embd=embedding_group,
        pos_embd=None,
        inter_dist_opt=None,
        # For Megatron: all ranks that together hold one copy of the optimizer's state; here the whole world.
        intra_dist_opt=dist.group.WORLD,
        **experts,
    )
    return ModelGroups(grid, collection, rank)


def _expert_groups(
    grid: ModelGrid, *, timeout: datetime.timedelta | None, backend: str | None
) -> dict[str, dist.ProcessGroup | None]:
    """Returns the groups of the experts' own grid, under Megatron's names."""
    ranks = grid.expert_ranks()
    subgroup = partial(_subgroup, timeout=timeout, backend=backend)
    data_parallel = ranks.permute(0, 2, 3, 1).reshape(-1, grid.expert_dp_size)
    expert_dp_group = _subgroup(data_parallel, timeout=timeout, backend=None)
    return {
        "ep": subgroup(ranks.transpose(2, 3).reshape(-1, grid.ep_size)),
        "expt_tp": subgroup(ranks.reshape(-1, grid.expert_tp_size)),
        "expt_dp": expert_dp_group,
        "intra_expt_dp": expert_dp_group,
        "tp_ep": subgroup(ranks.reshape(-1, grid.expert_tp_size * grid.ep_size)),
        "tp_ep_pp": subgroup(ranks.transpose(0, 1).reshape(grid.expert_dp_size, -1)),
    }


def _subgroup(
    rows: torch.Tensor, *, timeout: datetime.timedelta | None, backend: str | None
) -> dist.ProcessGroup | None:
    """Creates the groups `rows` `[groups, size]` and returns this rank's; None on a rank that is in none."""
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout, backend=backend)
    assert not isinstance(group, int), "every rank of the world takes part"
    return group
