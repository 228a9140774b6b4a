"""Joining a world that cannot be made."""

import resource
import socket

import pytest
import torch

from megatron_tip.errors import ConfigError
from megatron_tip.parallel import distributed
from megatron_tip.parallel.distributed import init_distributed


@pytest.fixture
def place(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("hard,expected", [(4096, 512), (300, 300), (resource.RLIM_INFINITY, 512)])
def test_many_files_may_be_open(monkeypatch, hard, expected):
    limits = [(256, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    distributed._allow_open_files(512)
    distributed._allow_open_files(128)
    assert limits[1:] == [(expected, hard)]


def test_port_in_use_is_named(place, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: expected a free port .*set MASTER_PORT"):
            init_distributed(timeout_seconds=30)


def test_more_workers_than_gpus_are_refused(place, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="one worker per GPU, 2 on this machine, got local rank 2"):
        init_distributed()


@pytest.mark.parametrize("rank,whom", [("0", "the other 1 ranks to connect to it"), ("1", "rank 0")])
def test_a_worker_says_whom_it_waits_for(place, monkeypatch, caplog, rank, whom):
    """RANK and WORLD_SIZE that another job left behind: nobody else comes."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_FIRST_WORD_SECONDS", 0.2)
    monkeypatch.setattr(distributed, "_NEXT_WORD_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"expected (all 2 ranks|rank 0 there).*unset RANK and WORLD_SIZE"):
        init_distributed(timeout_seconds=3)
    assert f"rank {rank} of 2 has waited 0 s for {whom} at MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}" in caplog.text
    assert caplog.text.count("unset RANK and WORLD_SIZE") > 2


def test_a_run_without_a_gpu_says_so_loudly(caplog):
    distributed._log_device(torch.device("cpu"), 3)
    (record,) = caplog.records
    assert (record.levelname, "NO GPU is visible to torch" in record.message) == ("WARNING", True)
    assert "3 workers run on the CPU" in record.message
