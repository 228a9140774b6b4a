"""Under which address servers reach the trainer, and broadcasts that never end. Others are tested with real servers."""

import socket
import threading
import time
from concurrent.futures import Future

import pytest

from megatron_tip.errors import ServerError
from megatron_tip.rollout.sglang.weights import broadcast as broadcast_module
from megatron_tip.rollout.sglang.weights.broadcast import WeightGroup, own_address


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


class EndlessWork:
    """A kernel that waits for a peer that is gone."""

    def is_completed(self):
        return False

    def wait(self):
        raise AssertionError("it would never return")


def group_of(backend="nccl", timeout_seconds=30.0):
    """A group whose servers are gone, without the network that its creation needs."""
    group = WeightGroup.__new__(WeightGroup)
    group.members, group.name = [], "group"
    group._backend, group._timeout_seconds = backend, timeout_seconds
    group._group, group._executor = object(), None
    return group


def done(value=None, error=None):
    future = Future()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
    return future


@pytest.mark.parametrize("begun", [done(EndlessWork()), Future()], ids=["in its kernel", "while it connects"])
def test_a_server_that_fails_ends_the_wait_for_a_broadcast_that_cannot_end(begun):
    calls = {"server": done(error=ServerError("connection reset"))}
    with pytest.raises(ServerError, match="failed in the middle of a broadcast"):
        group_of()._wait_for(begun, calls)


def test_a_server_that_says_nothing_ends_the_wait_after_the_time_limit():
    with pytest.raises(ServerError, match="more than 0 s"):
        group_of(timeout_seconds=0.05)._wait_for(done(EndlessWork()), {"server": Future()})


def test_a_broadcast_that_fails_is_a_server_error():
    with pytest.raises(ServerError, match="the broadcast failed: closed by peer"):
        group_of()._wait_for(done(error=RuntimeError("closed by peer")), {"server": Future()})


@pytest.mark.parametrize(
    "backend, failed, aborted", [("nccl", True, True), ("nccl", False, False), ("gloo", True, False)]
)
def test_a_failed_nccl_group_is_aborted_and_others_are_left(monkeypatch, backend, failed, aborted):
    calls = []
    monkeypatch.setattr(broadcast_module, "_abort_process_group", lambda group: calls.append("aborted"))
    monkeypatch.setattr(broadcast_module.dist, "destroy_process_group", lambda group: calls.append("left"))
    group_of(backend).close(failed=failed)
    assert calls == ["aborted" if aborted else "left"]


def test_an_abort_that_does_not_return_holds_nobody_up(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(broadcast_module, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(broadcast_module, "_abort_process_group", lambda group: over.wait(60.0))
    begin = time.monotonic()
    group_of().close(failed=True)
    assert time.monotonic() - begin < 30.0
    over.set()
