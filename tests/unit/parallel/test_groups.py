"""Time limits and backends of process groups; what they hold is tested with the models that use them."""

import torch
import torch.distributed as dist

from megatron_tip.parallel import groups as groups_module
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import build_groups
from tests.helpers.distributed import run_workers


def time_limits():
    groups = build_groups(ModelGrid.over(1, tp_size=1, pp_size=1, owner="student"), timeout_seconds=77.0)
    collection = groups.collection
    own = [collection.tp, collection.pp, collection.dp, collection.mp, collection.cp, collection.embd]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in own]


def test_every_group_has_the_runs_time_limit(tmp_path):
    assert run_workers(time_limits, 1, tmp_path) == [[77.0] * 6]


def backends(config):
    created = []

    def create(rows, timeout, backend):
        created.append(backend)
        return None, []

    groups_module.dist.get_backend_config = lambda: config
    groups_module.dist.new_subgroups_by_enumeration = create
    build_groups(ModelGrid.over(dist.get_world_size(), tp_size=1, pp_size=1, owner="student"))
    return created


def test_on_gpus_only_data_parallel_groups_have_a_mesh_of_connections_between_cpus(tmp_path):
    for config, others in (("cpu:gloo,cuda:nccl", "nccl"), ("cpu:gloo", None)):
        (created,) = run_workers(backends, 1, tmp_path, config)
        assert created == [others, others, None, others, others, others, others]
