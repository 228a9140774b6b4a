"""The protocol of all weight transports, and calls to many servers at once."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from megatron_tip.errors import EngineError, ServerError, ServerMismatchError
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.pool import PooledServer

logger = logging.getLogger(__name__)


class WeightTransport(Protocol):
    """A transport of a stream of tensors to servers. `num_bytes`: of the last `send`, counted once for all servers."""

    num_bytes: int

    def check(self, server: PooledServer) -> None:
        """Raises ServerMismatchError for a server that can never receive weights this way."""
        ...

    def send(
        self, servers: Sequence[PooledServer], weights: Iterable[tuple[str, Tensor]], version: str
    ) -> list[PooledServer]:
        """Sends `weights` to `servers`; returns those that hold all of them and report `version`.

        It need not exhaust `weights` when it fails.

        Raises:
            OutputError: the shared folder cannot be written.
        """
        ...

    def refresh(self, server: PooledServer) -> str | None:
        """Gives one server the weights of the last `send` if they are available; returns their version, or None."""
        ...

    def close(self) -> None: ...


def refuse_replicas(server: PooledServer, transport: str) -> None:
    """Raises ServerMismatchError for a server of several pipeline stages or replicas, which take only whole files."""
    if server.num_replicas > 1:
        raise ServerMismatchError(
            f'{server.url}: expected a server of pp_size 1 and dp_size 1 with sync.transport = "{transport}", got '
            f'{server.num_replicas} stages or replicas; set sync.transport = "folder"'
        )


def start_on_all(
    executor: ThreadPoolExecutor, servers: Sequence[PooledServer], call: Callable[[SGLangClient], object]
) -> dict[PooledServer, Future[object]]:
    """Starts `call` for every server, each in a thread of `executor`; returns the futures."""
    return {server: executor.submit(call, server.http) for server in servers}


def those_that_did(calls: dict[PooledServer, Future[object]]) -> list[PooledServer]:
    """Waits for all calls; returns the servers whose call succeeded, and logs the failures."""
    done = []
    for server, call in calls.items():
        try:
            call.result()
            done.append(server)
        except EngineError as error:
            logger.warning("weight sync: %s", error)
    return done


def that_report(servers: Sequence[PooledServer], version: str) -> list[PooledServer]:
    """Returns those of `servers` that report `version`."""
    right = []
    for server in servers:
        try:
            reported = server.http.model_info().weight_version
        except ServerError as error:
            logger.warning("weight sync: %s", error)
            continue
        if reported == version:
            right.append(server)
        else:
            logger.warning("weight sync: %s reports the weights %s, not %s", server.url, reported, version)
    return right


@contextmanager
def without_heartbeats(servers: Sequence[PooledServer]) -> Iterator[None]:
    """Suspends the pool's heartbeats to servers that load weights: they do not sample and would not answer."""
    for server in servers:
        server.busy_with_sync = True
    try:
        yield
    finally:
        for server in servers:
            server.busy_with_sync = False
