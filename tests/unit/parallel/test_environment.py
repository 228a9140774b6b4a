"""A worker's place and thread settings from environment variables."""

import os
import socket
import stat

import psutil
import pytest

from megatron_tip.errors import ConfigError
from megatron_tip.parallel import environment as environment_module
from megatron_tip.parallel.environment import (
    SPIN_COUNT,
    available_threads,
    drop_expandable_segments,
    expands_segments,
    gloo_interface,
    is_worker,
    nccl_environment,
    server_network_environment,
    thread_environment,
    worker_environment,
)

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),2",
    "SLURM_STEP_NODELIST": "node[07-09]",
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A `scontrol show hostnames` that knows one list of nodes."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[07-09]" ] && printf "node07\\nnode08\\nnode09\\n"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(environment_module, "_source_to", lambda host: "127.0.0.1" if host == "node07" else "")


@pytest.mark.parametrize(
    "environ,expected",
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        (STEP, True),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),
    ],
    ids=["alone", "torchrun", "srun", "shell in a step of one task", "batch script"],
)
def test_is_worker(environ, expected):
    assert is_worker(environ) is expected


def test_place_in_a_slurm_step(scontrol):
    place = worker_environment(STEP, threads=8)
    assert place == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": place["MASTER_PORT"],
        "OMP_NUM_THREADS": "4",
        "GOMP_SPINCOUNT": SPIN_COUNT,
    }


def test_slurm_port_is_the_step_s_own_and_equal_on_all_ranks(scontrol):
    def port(**changes):
        return int(worker_environment(STEP | changes, threads=1)["MASTER_PORT"])

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert len({port(), port(SLURM_STEP_ID="3"), port(SLURM_JOB_ID="4712")}) == 3
    assert 1024 < port(SLURM_JOB_ID="99999999") < 32768


def test_slurm_cpus_per_task_are_a_worker_s_threads(scontrol):
    assert worker_environment({**STEP, "SLURM_CPUS_PER_TASK": "7"}, threads=0)["OMP_NUM_THREADS"] == "7"
    assert worker_environment({**STEP, "SLURM_CPUS_PER_TASK": "7"}, threads=6)["OMP_NUM_THREADS"] == "3"


def test_what_the_user_set_holds_in_a_slurm_step():
    known = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    place = worker_environment(known, threads=1)  # no scontrol: it is not needed
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_slurm_without_scontrol_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"scontrol show hostnames node\[07-09\].*set MASTER_ADDR"):
        worker_environment(STEP, threads=1)


def test_incomplete_slurm_step_names_the_variable():
    with pytest.raises(ConfigError, match="SLURM_LOCALID"):
        worker_environment({name: value for name, value in STEP.items() if name != "SLURM_LOCALID"}, threads=1)


def test_torchrun_place_is_left_alone():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "64"}
    settings = worker_environment(environ, threads=6)
    assert settings == {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": SPIN_COUNT}


@pytest.mark.parametrize(
    "threads,local_workers,environ,expected",
    [
        (8, 3, {}, "2"),
        (2, 3, {}, "1"),
        (8, 2, {"OMP_NUM_THREADS": "16"}, "4"),
        (0, 2, {"OMP_NUM_THREADS": "16"}, "16"),
        (0, 1, {}, str(available_threads())),
    ],
)
def test_threads_are_shared_and_the_user_s_choice_holds(threads, local_workers, environ, expected):
    assert thread_environment(threads, local_workers, environ)["OMP_NUM_THREADS"] == expected


def test_waiting_threads_stay_awake_only_for_a_moment_unless_the_user_says_otherwise():
    assert thread_environment(2, 1, {})["GOMP_SPINCOUNT"] == SPIN_COUNT
    assert thread_environment(2, 1, {"GOMP_SPINCOUNT": "7"})["GOMP_SPINCOUNT"] == "7"


INTERFACES = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.1.0.9", "fe80::1"], "ib0": ["10.2.0.9"]}
OVER_HOSTS = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    "environ, sources, expected",
    [
        (OVER_HOSTS, ["10.2.0.9", "10.1.0.9"], "ib0"),  # the route to MASTER_ADDR
        (OVER_HOSTS, ["127.0.1.1", "10.1.0.9"], "eth0"),  # the first host, whose name resolves to loopback
        (OVER_HOSTS, ["127.0.1.1"], ""),
        (OVER_HOSTS, [], ""),
        (OVER_HOSTS, ["10.3.0.9"], ""),
        ({**OVER_HOSTS, "MASTER_ADDR": "127.0.0.1"}, ["127.0.0.1", "10.1.0.9"], ""),  # all on one host after all
        ({**OVER_HOSTS, "GLOO_SOCKET_IFNAME": "eth7"}, ["10.2.0.9"], ""),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, ["10.2.0.9"], ""),
        ({}, ["10.2.0.9"], ""),
    ],
)
def test_gloo_listens_where_other_hosts_reach_it(environ, sources, expected):
    assert gloo_interface(environ, sources, INTERFACES) == expected


def test_a_worker_of_several_hosts_gets_the_interface_of_the_route_to_the_first(scontrol, monkeypatch):
    name, own = next(
        (name, one.address)
        for name, all_own in psutil.net_if_addrs().items()
        for one in all_own
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    )
    monkeypatch.setattr(environment_module, "_source_to", lambda host: own if host == "node07" else "")
    assert worker_environment(STEP, threads=8)["GLOO_SOCKET_IFNAME"] == name
    assert "GLOO_SOCKET_IFNAME" not in worker_environment({"RANK": "0", "WORLD_SIZE": "1"}, threads=8)


def test_a_server_uses_the_interface_of_its_own_address():
    name, own = next(
        (name, one.address)
        for name, all_own in psutil.net_if_addrs().items()
        for one in all_own
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    )
    assert server_network_environment({}, own) == {"GLOO_SOCKET_IFNAME": name}
    assert server_network_environment({"GLOO_SOCKET_IFNAME": "eth7"}, own) == {}
    assert server_network_environment({}, "127.0.0.1") == {}


def test_nccl_is_set_for_trainer_and_servers_alike_unless_the_user_has_set_it():
    off = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}  # SGLang's own defaults for its processes
    assert nccl_environment({}) == off
    assert nccl_environment({"NCCL_NVLS_ENABLE": "1"}) == off | {"NCCL_NVLS_ENABLE": "1"}
    worker, threads = {"RANK": "0", "WORLD_SIZE": "1"}, {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": SPIN_COUNT}
    assert worker_environment(worker, threads=1, joins_servers=True) == threads | off
    assert worker_environment(worker, threads=1) == threads


@pytest.mark.parametrize(
    "options, rest",
    [
        ("expandable_segments:True", ""),
        ("expandable_segments:True,max_split_size_mb:128", "max_split_size_mb:128"),
        (
            "roundup_power2_divisions:[256:1,512:2], expandable_segments : True",
            "roundup_power2_divisions:[256:1,512:2]",
        ),
    ],
)
@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_found_and_dropped_alone(name, options, rest):
    environ = {"OTHER": "1", name: options}
    assert expands_segments(environ)
    drop_expandable_segments(environ)
    assert environ == {"OTHER": "1", name: rest}
    assert not expands_segments(environ)


def test_expandable_segments_that_are_off_are_not_used():
    assert not expands_segments({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})
