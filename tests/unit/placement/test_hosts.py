"""What a process knows of its machines from its environment."""

import pytest

from megatron_tip.errors import ConfigError
from megatron_tip.placement.hosts import device_names, gpu_request, hosts_elsewhere, hosts_here, visible_gpus


@pytest.mark.parametrize(
    "value,expected",
    [(None, (0, 1)), ("4,5", (4, 5)), ("7", (7,)), ("GPU-aa,GPU-bb", (0, 1)), ("3, 1", (3, 1)), ("2,3,0", (2, 3))],
)
def test_ids_are_the_numbers_of_cuda_visible_devices(value: str | None, expected: tuple[int, ...]):
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert visible_gpus(environ, 1 if value == "7" else 2) == expected


def test_a_server_gets_its_gpus_in_the_notation_of_its_parent():
    assert device_names((6, 7), {}) == "6,7"
    assert device_names((6, 7), {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == "6,7"
    assert device_names((1,), {"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}) == "GPU-bb"


def test_nodes_are_filled_one_after_another():
    hosts = hosts_elsewhere(20, 8)
    assert (hosts.trainer_nodes, hosts.workers_per_node, hosts.gpus) == (3, 8, tuple(range(8)))
    assert hosts_elsewhere(3, 0).gpus == ()


def test_workers_of_this_machine():
    alone = hosts_here(4, {"LOCAL_WORLD_SIZE": "9"}, 4)
    assert (alone.workers_per_node, alone.gpus) == (4, (0, 1, 2, 3)), "no worker: the variable is of something else"
    worker = hosts_here(16, {"RANK": "3", "LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 8)
    assert (worker.trainer_nodes, worker.workers_per_node) == (2, 8)
    bound = hosts_here(8, {"RANK": "3", "LOCAL_WORLD_SIZE": "4", "SLURM_STEP_ID": "0", "CUDA_VISIBLE_DEVICES": "2"}, 1)
    assert bound.gpus == (0, 1, 2, 3), "SLURM shows each task only its own"


@pytest.mark.parametrize("name", ["SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "TIP_GPUS_PER_NODE"])
def test_gpus_that_were_asked_for_and_are_not_there_are_no_reason_for_the_cpu(name: str):
    with pytest.raises(ConfigError, match=rf"{name}=8: expected GPUs that torch can use on this machine, got none"):
        hosts_here(8, {name: "8"}, 0)
    assert hosts_here(8, {name: "8"}, 8).gpus
    assert hosts_here(8, {name: "0"}, 0).gpus == ()
    assert gpu_request({name: "8", "CUDA_VISIBLE_DEVICES": ""}) == "", "an empty list asks for the CPU"
