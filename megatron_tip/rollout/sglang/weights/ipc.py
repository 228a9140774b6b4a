"""Weight transfer by handles of memory that trainer and servers share: CUDA IPC on a GPU, shared memory on a CPU."""

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_tip.errors import ServerError, ServerMismatchError
from megatron_tip.rollout.handover.buckets import WeightBucket, weight_buckets
from megatron_tip.rollout.handover.exchange import HandleExchange
from megatron_tip.rollout.handover.shared_memory import handles, shared_buffer
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.pool import PooledServer
from megatron_tip.rollout.sglang.weights.broadcast import own_address
from megatron_tip.rollout.sglang.weights.session import close_session, open_session
from megatron_tip.rollout.sglang.weights.transport import (
    refuse_replicas,
    start_on_all,
    that_report,
    those_that_did,
    without_heartbeats,
)


class IpcTransport:
    """A transport of weights in buckets of `bucket_bytes` that servers copy out of the trainer's own memory.

    Each rank of a server opens a handle of the trainer rank that shares its GPU (`PooledServer.neighbours`). Servers
    load independently: one that fails is left out, the others get all weights.

    Args:
        device: rank 0's.
        exchange: gets the handles of ranks other than 0; None: all servers are rank 0's neighbours.
    """

    def __init__(self, *, bucket_bytes: int, device: torch.device, exchange: HandleExchange | None = None) -> None:
        self.num_bytes = 0
        self._bucket_bytes = bucket_bytes
        self._device = device
        self._exchange = exchange
        self._executor = ThreadPoolExecutor(64, thread_name_prefix="weight-sync")

    def check(self, server: PooledServer) -> None:
        """Refuses several pipeline stages or replicas, and ranks of which it is not known whose GPU they share."""
        refuse_replicas(server, "ipc")
        if not server.neighbours and not _is_here(server.url):
            raise ServerMismatchError(
                f'{server.url}: expected a server on this machine with sync.transport = "ipc", got one on another; set '
                'sync.transport = "broadcast"'
            )
        if server.neighbours and len(server.neighbours) != server.tp_size:
            raise ServerMismatchError(
                f"{server.url}: expected a server of tp_size {len(server.neighbours)} on the GPUs of the trainer's "
                f'ranks {server.neighbours}, got tp_size {server.tp_size}; set sync.transport = "broadcast"'
            )

    def send(
        self, servers: Sequence[PooledServer], weights: Iterable[tuple[str, Tensor]], version: str
    ) -> list[PooledServer]:
        """Makes every server copy each bucket; returns those that took all of them.

        Raises:
            OutputError: there is no shared memory for a bucket.
        """
        self.num_bytes = 0
        # A GPU's copies may still run when the server answers: torch keeps a buffer until they are done, unless reused.
        reuse = self._device.type == "cpu"
        new_buffer = partial(shared_buffer, device=self._device)
        with without_heartbeats(servers):
            ready = those_that_did(start_on_all(self._executor, servers, lambda client: open_session(client, version)))
            try:
                self._want(ready)
                for bucket in weight_buckets(weights, self._bucket_bytes, new_buffer, reuse=reuse):
                    self.num_bytes += bucket.data.numel()
                    ready = self._hand_over(bucket, ready)
                    self._want(ready)
                    if not ready:
                        return []
            finally:
                self._want([])
            done = those_that_did(start_on_all(self._executor, ready, lambda client: close_session(client, version)))
            return that_report(done, version)

    def refresh(self, server: PooledServer) -> str | None:
        """Returns None: the last weights are not kept, and `server` gets weights with the next sync."""
        return None

    def close(self) -> None:
        self._executor.shutdown(wait=False)

    def _want(self, servers: Sequence[PooledServer]) -> None:
        """Says how many handles of the next bucket each rank but 0 gives."""
        if self._exchange is not None:
            ranks = [rank for server in servers for rank in _neighbours(server)]
            self._exchange.wanted = {rank: count for rank, count in Counter(ranks).items() if rank != 0}

    def _hand_over(self, bucket: WeightBucket, servers: Sequence[PooledServer]) -> list[PooledServer]:
        """Returns those of `servers` that loaded `bucket`."""
        ranks = Counter(rank for server in servers for rank in _neighbours(server))
        available = dict(self._exchange.received) if self._exchange is not None else {}
        available[0] = handles(bucket, ranks[0])
        calls = {}
        for server in servers:
            own = [available[rank].pop() if available.get(rank) else "" for rank in _neighbours(server)]
            calls |= start_on_all(self._executor, [server], partial(_load, bucket_handles=own))
        done = those_that_did(calls)
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # frees what servers have let go of
        return done


def _is_here(url: str) -> bool:
    """Returns whether the server at `url` is on this machine."""
    own = own_address([url])
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(urlsplit(url).hostname or "", None)}
    return ip_address(own).is_loopback or own in addresses


def _neighbours(server: PooledServer) -> Sequence[int]:
    """Returns the trainer rank whose memory each rank of `server` opens."""
    return server.neighbours or [0] * server.tp_size


def _load(client: SGLangClient, bucket_handles: Sequence[str]) -> None:
    if not all(bucket_handles):
        raise ServerError(f"{client.url}: a rank of the trainer gave no handle of its weights; see its log")
    body = {
        "serialized_named_tensors": list(bucket_handles),
        "load_format": "flattened_bucket",
        "flush_cache": False,
    }
    client.weights_endpoint("update_weights_from_tensor", body)
