"""What every way of bringing weights to servers shares: the protocol, and one call to many servers at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from megatron_tip.errors import EngineError, ServerError
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.pool import PooledServer

logger = logging.getLogger(__name__)


class WeightTransport(Protocol):
    """A way from a stream of tensors to servers. `num_bytes`: sent by the last `send`, once, however many received."""

    num_bytes: int

    def check(self, server: PooledServer) -> None:
        """Raises ServerMismatchError for a server that cannot take weights this way, however long one waits."""
        ...

    def send(
        self, servers: Sequence[PooledServer], weights: Iterable[tuple[str, Tensor]], version: str
    ) -> list[PooledServer]:
        """Brings `weights` to `servers`; returns those that hold all of it and say that their version is `version`.

        It need not consume `weights` to its end when it fails.

        Raises:
            OutputError: the shared folder cannot be written.
        """
        ...

    def refresh(self, server: PooledServer) -> str | None:
        """Gives one server the weights of the last `send` where they are at hand; returns their version, or None."""
        ...

    def close(self) -> None: ...


def start_on_all(
    executor: ThreadPoolExecutor, servers: Sequence[PooledServer], call: Callable[[SGLangClient], object]
) -> dict[PooledServer, Future[object]]:
    """`call` at every server, each in a thread of `executor`."""
    return {server: executor.submit(call, server.http) for server in servers}


def those_that_did(calls: dict[PooledServer, Future[object]]) -> list[PooledServer]:
    """Waits for all calls; the servers whose call went well. What failed is logged."""
    done = []
    for server, call in calls.items():
        try:
            call.result()
            done.append(server)
        except EngineError as error:
            logger.warning("weight sync: %s", error)
    return done


def that_report(servers: Sequence[PooledServer], version: str) -> list[PooledServer]:
    """Those of `servers` that say that they hold `version`."""
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
    """Spares servers that load weights the looks of the pool: they sample nothing and would not answer."""
    for server in servers:
        server.busy_with_sync = True
    try:
        yield
    finally:
        for server in servers:
            server.busy_with_sync = False
