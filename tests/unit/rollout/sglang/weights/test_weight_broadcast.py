"""Under which address servers reach the trainer. Broadcasts themselves are tested with real servers."""

import socket

import pytest

from megatron_tip.errors import ServerError
from megatron_tip.rollout.sglang.weights.broadcast import own_address


@pytest.mark.parametrize("urls", [[], ["http://127.0.0.1:30000", "http://localhost:1"], ["http://[::1]:30000"]])
def test_servers_of_this_machine_reach_it_by_loopback(urls):
    assert own_address(urls) == "127.0.0.1"


def test_servers_of_other_machines_get_the_address_of_the_way_to_them(monkeypatch):
    ways = {"10.1.2.3": "10.1.0.9", "127.0.0.1": "127.0.0.1"}

    class Way:
        def __init__(self, family, kind):
            self.host = ""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def connect(self, destination):
            self.host = destination[0]

        def getsockname(self):
            return ways[self.host], 5

    monkeypatch.setattr(socket, "socket", Way)
    # The machine's own name may well stand for loopback, where nobody else reaches it.
    assert own_address(["http://127.0.0.1:30000", "http://10.1.2.3:30000"]) == "10.1.0.9"


def test_a_name_that_nobody_knows_is_a_server_error(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ServerError, match=r"no route to http://node7:1"):
        own_address(["http://node7:1"])
