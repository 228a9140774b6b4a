"""Weight transfer by broadcast, in a process group that the trainer's first process shares with the servers' ranks."""

import datetime
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from typing import TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import (
    PrefixStore,
    _abort_process_group,
    _new_process_group_helper,
    _world,
)

from megatron_tip.errors import ServerError
from megatron_tip.parallel.environment import source_address
from megatron_tip.rollout.handover.buckets import WeightBucket, weight_buckets
from megatron_tip.rollout.sglang.pool import PooledServer
from megatron_tip.rollout.sglang.weights.session import close_session, open_session
from megatron_tip.rollout.sglang.weights.transport import (
    refuse_replicas,
    start_on_all,
    that_report,
    those_that_did,
    without_heartbeats,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.0005
LEAVE_SECONDS = 20.0

T = TypeVar("T")


class WeightGroup:
    """The process group of this process (rank 0) and all ranks of `servers`; created once, used until one fails."""

    def __init__(
        self,
        servers: Sequence[PooledServer],
        executor: ThreadPoolExecutor,
        *,
        name: str,
        backend: str,
        host: str,
        timeout_seconds: float,
    ) -> None:
        """Creates the group. Collective with the servers.

        Raises:
            ServerError: a server did not join in time.
        """
        self.members = [(server, server.incarnation) for server in servers]
        self.name = name
        self._executor = executor
        self._backend = backend
        self._timeout_seconds = timeout_seconds
        self._group: dist.ProcessGroup | None = None
        world_size = 1 + sum(server.tp_size for server in servers)
        timeout = datetime.timedelta(seconds=timeout_seconds)
        store, port = _listening_store(host, world_size, timeout)
        calls, offset = {}, 1
        for server in servers:
            body = {
                "master_address": host,
                "master_port": port,
                "rank_offset": offset,
                "world_size": world_size,
                "group_name": name,
                "backend": backend,
            }
            calls |= start_on_all(executor, [server], _endpoint("init_weights_update_group", body))
            offset += server.tp_size
        self._join(store, world_size, backend, timeout)
        if len(those_that_did(calls)) < len(servers):
            self.close(failed=True)
            raise ServerError("weight sync: a server refused to join the process group")

    def _join(self, store: TCPStore, world_size: int, backend: str, timeout: datetime.timedelta) -> None:
        """Joins the group as rank 0; blocks until all have joined."""
        try:
            # Not new_group: the servers are not in the trainer's world. SGLang creates its side in the same way.
            self._group, _ = _new_process_group_helper(
                world_size,
                0,
                [],
                backend,
                PrefixStore(self.name, store),
                group_name=self.name,  # pyright: ignore[reportArgumentType]  # GroupName, which older torch lacks
                timeout=2 * timeout,  # NCCL's own watchdog would end this process: `_wait_for` gives up before it
            )
            _world.pg_group_ranks[self._group] = {rank: rank for rank in range(world_size)}
        except (RuntimeError, ValueError) as error:
            raise ServerError(f"weight sync: the servers did not join the process group: {error}") from error

    def is_of(self, servers: Sequence[PooledServer]) -> bool:
        return self.members == [(server, server.incarnation) for server in servers]

    def broadcast(self, bucket: WeightBucket) -> None:
        """Sends one bucket to all servers, which load it.

        Raises:
            ServerError: a server failed or refused it; all of them may hold a part of it.
        """
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        servers = [server for server, _ in self.members]
        calls = start_on_all(self._executor, servers, _endpoint("update_weights_from_distributed", body))
        # NCCL connects in the first broadcast, and waits there for servers that may be gone: not in this thread.
        begun = _in_daemon(lambda: dist.broadcast(bucket.data, src=0, group=self._group, async_op=True))
        self._wait_for(begun, calls)
        if len(those_that_did(calls)) < len(servers):
            raise ServerError("weight sync: a server did not load a bucket")

    def _wait_for(self, begun: "Future[dist.Work | None]", calls: Mapping[PooledServer, Future[object]]) -> None:
        """Waits until a broadcast is complete, or cannot be any more.

        Raises:
            ServerError: a server failed, the broadcast did, or it took too long.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while not (begun.done() and (begun.exception() or _work_of(begun).is_completed())):
            errors = [call.exception() for call in calls.values() if call.done()]
            if error := next(filter(None, errors), None):
                raise ServerError(f"weight sync: a server failed in the middle of a broadcast: {error}")
            if time.monotonic() > deadline:
                raise ServerError(f"weight sync: a broadcast took more than {self._timeout_seconds:.0f} s")
            time.sleep(POLL_SECONDS)
        try:
            _work_of(begun).wait()
        except RuntimeError as error:
            raise ServerError(f"weight sync: the broadcast failed: {error}") from error

    def close(self, *, failed: bool = False) -> None:
        """Leaves the group, which ends the servers' waiting in it.

        Args:
            failed: a member may be gone. NCCL's kernels would wait for it for ever: they are aborted.
        """
        group, self._group = self._group, None
        if group is None:
            return
        leave = _abort_process_group if failed and self._backend == "nccl" else dist.destroy_process_group
        left = _in_daemon(partial(leave, group))
        del group, leave
        with suppress(RuntimeError, ValueError, TimeoutError):
            left.result(timeout=LEAVE_SECONDS)
        del left
        servers = [server for server, incarnation in self.members if server.is_up and server.incarnation == incarnation]
        body: dict[str, object] = {"group_name": self.name}
        calls = start_on_all(self._executor, servers, _endpoint("destroy_weights_update_group", body))
        for call in calls.values():
            with suppress(ServerError):
                call.result()


class BroadcastTransport:
    """A transport of weights in buckets of `bucket_bytes`, over NCCL on GPUs and gloo on CPUs.

    Args:
        run_id: distinguishes this run's process groups from other runs'.
        host: the name by which the servers reach this machine; None: loopback if all of them are on it.
        timeout_seconds: for one bucket, and for the servers to join.
    """

    def __init__(
        self,
        *,
        run_id: str,
        bucket_bytes: int,
        backend: str,
        device: torch.device | str,
        timeout_seconds: float,
        host: str | None = None,
    ) -> None:
        self.num_bytes = 0
        self._run_id = run_id
        self._bucket_bytes = bucket_bytes
        self._backend = backend
        self._new_buffer = partial(torch.empty, dtype=torch.uint8, device=device)
        self._timeout_seconds = timeout_seconds
        self._host = host
        self._group: WeightGroup | None = None
        self._num_groups = 0
        self._executor = ThreadPoolExecutor(64, thread_name_prefix="weight-sync")

    def check(self, server: PooledServer) -> None:
        """Refuses several pipeline stages or replicas: SGLang receives broadcasts only in its tensor-parallel ranks."""
        refuse_replicas(server, "broadcast")

    def send(
        self, servers: Sequence[PooledServer], weights: Iterable[tuple[str, Tensor]], version: str
    ) -> list[PooledServer]:
        """Broadcasts to all servers that open a session; if one fails, none counts as updated."""
        self.num_bytes = 0
        with without_heartbeats(servers):
            ready = those_that_did(start_on_all(self._executor, servers, lambda client: open_session(client, version)))
            if not ready:
                return []
            try:
                group = self._group_of(ready)
                for bucket in weight_buckets(weights, self._bucket_bytes, self._new_buffer):
                    self.num_bytes += bucket.data.numel()
                    group.broadcast(bucket)
            except ServerError as error:
                logger.warning("%s; it starts over with the remaining servers", error)
                self._leave_group(failed=True)
                return []
            except BaseException:
                self._leave_group(failed=True)
                raise
            done = those_that_did(start_on_all(self._executor, ready, lambda client: close_session(client, version)))
            return that_report(done, version)

    def refresh(self, server: PooledServer) -> str | None:
        """Returns None: the last broadcast is not kept, and `server` gets weights with the next sync."""
        return None

    def close(self) -> None:
        self._leave_group()
        self._executor.shutdown(wait=False)

    def _group_of(self, servers: Sequence[PooledServer]) -> WeightGroup:
        if self._group is None or not self._group.is_of(servers):
            self._leave_group()
            self._num_groups += 1
            self._group = WeightGroup(
                servers,
                self._executor,
                name=f"{self._run_id}-{self._num_groups}",
                backend=self._backend,
                host=self._host or own_address([server.url for server in servers]),
                timeout_seconds=self._timeout_seconds,
            )
        return self._group

    def _leave_group(self, *, failed: bool = False) -> None:
        if self._group is not None:
            self._group.close(failed=failed)
            self._group = None


def _listening_store(host: str, world_size: int, timeout: datetime.timedelta) -> tuple[TCPStore, int]:
    """Returns the rendezvous of a process group, and its port, a free one of `host` alone.

    By default TCPStore listens on all addresses of the machine.
    """
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _in_daemon(action: Callable[[], T]) -> Future[T]:
    """Runs `action` in a thread that the process's end does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="weight-broadcast").start()
    return future


def _work_of(begun: "Future[dist.Work | None]") -> dist.Work:
    work = begun.result()
    assert work is not None, "this process is in the group"
    return work


def _endpoint(name: str, body: dict[str, object]):
    return lambda client: client.weights_endpoint(name, body)


def own_address(urls: Sequence[str]) -> str:
    """Returns the address by which the servers at `urls` reach this machine.

    It is the source address of the route to the first server on another machine; loopback if there is none.

    The machine's own name does not work: it often resolves to loopback.

    Raises:
        ServerError: there is no route to one of them.
    """
    for url in urls:
        try:
            address = source_address(urlsplit(url).hostname)
        except OSError as error:
            raise ServerError(f"weight sync: no route to {url}: {error}") from error
        if not ip_address(address).is_loopback:
            return address
    return "127.0.0.1"
