"""Joining a world that cannot be made."""

import socket

import pytest
import torch

from megatron_tip.errors import ConfigError
from megatron_tip.parallel.distributed import init_distributed


@pytest.fixture
def place(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)


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
