"""The servers of a run: their state and weights, the choice of a server per request, and the return of dead ones."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from megatron_tip.errors import EngineError, ServerError, ServersLostError, WeightsLostError
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.server import SGLangServer

logger = logging.getLogger(__name__)

MAX_BACK_OFF_SECONDS = 60.0
MISSED_PAUSE_SECONDS = 1.0
ROUTER_PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class PoolSettings:
    """Limits of a pool; times in seconds.

    `concurrency`: concurrent requests per server. `heartbeat`: interval between checks of a server, each of which is
    missed after `heartbeat_timeout`; after `missed_heartbeats` in a row the server counts as dead. `start_timeout`:
    limit for one of our own servers to become healthy. `wait`: how long to wait without any server.
    """

    concurrency: int = 64
    heartbeat: float = 5.0
    heartbeat_timeout: float = 25.0
    missed_heartbeats: int = 3
    start_timeout: float = 300.0
    wait: float = 600.0


class PooledServer:
    """One server of the pool; its fields change under the pool's lock.

    `process`: None for a given server. `weights`: the version that it holds completely, None if unknown. `is_suspect`:
    a request or a sync failed and the server has not been checked since. `incarnation` counts its restarts. `tp_size`:
    ranks that share each layer; `num_replicas`: pipeline stages times data-parallel replicas. `is_quantized`: it keeps
    its weights in another form than they are sent in. `neighbours`: the trainer's rank on the GPU of each of its ranks,
    for sync.transport = "ipc"; empty: rank 0 for all.
    """

    def __init__(
        self,
        connect: Callable[[str], SGLangClient],
        *,
        url: str = "",
        process: SGLangServer | None = None,
        neighbours: Sequence[int] = (),
    ) -> None:
        self.connect = connect
        self.process = process
        self.client = connect(url) if process is None else None
        self.is_up = False
        self.is_suspect = False
        self.weights: str | None = None
        self.in_flight = 0
        self.incarnation = 0
        self.tp_size = 1
        self.num_replicas = 1
        self.is_quantized = False
        self.neighbours = tuple(neighbours)
        self.look_now = threading.Event()
        self.busy_with_sync = False

    @property
    def url(self) -> str:
        return self.process.url if self.process else self.http.url

    @property
    def http(self) -> SGLangClient:
        assert self.client is not None, "the server has been started"
        return self.client


class ServerPool:
    """A pool that keeps `servers` running and leases them. Any thread may call its public methods.

    `on_back`: called with a server before it joins the pool, in the thread that watches it; may give the server weights
    and then returns their version. `on_contact` is called before that, when a given server may answer again; `on_up`
    after it has joined. `may_start`: False while dead servers stay dead, because others need their memory.

    Args:
        model_type: the model_type in config.json that every server must serve.
        router: chooses the server while all of them hold the weights; must route to exactly these servers.
    """

    def __init__(
        self,
        servers: Sequence[PooledServer],
        settings: PoolSettings,
        *,
        model_type: str,
        router: SGLangClient | None = None,
    ) -> None:
        self.servers = list(servers)
        self.settings = settings
        self.num_lost = 0
        self.num_restarts = 0
        self.may_start = True
        self.on_contact: Callable[[PooledServer], None] = lambda server: None
        self.on_back: Callable[[PooledServer], str | None] = lambda server: None
        self.on_up: Callable[[PooledServer], None] = lambda server: None
        self.router = router
        self._router_back_at = 0.0
        self._model_type = model_type
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._keepers: list[threading.Thread] = []

    def start(self) -> None:
        """Starts our own servers, waits for all servers, checks them, and begins to watch them.

        Raises:
            ServerError: a server does not start or does not answer.
            ServerMismatchError: a given server serves another model.
        """
        try:
            for server in self.servers:
                if server.process:
                    server.process.start()
            self._bring_up_all()
        except BaseException:
            self.close()
            raise
        for server in self.servers:
            keeper = threading.Thread(target=self._keep, args=(server,), name=f"keeper of {server.url}", daemon=True)
            self._keepers.append(keeper)
            keeper.start()

    def close(self) -> None:
        """Stops our own servers and closes all connections."""
        self._closing.set()
        for server in self.servers:
            server.look_now.set()
        if self.router:
            self.router.close()
        for server in self.servers:
            if server.client:
                server.client.close()
            if server.process:
                server.process.stop()
        for keeper in self._keepers:
            keeper.join(timeout=30.0)
        for server in self.servers:
            if server.process:
                server.process.stop()  # a keeper may just have started it

    def up(self, weights: str | None = None) -> list[PooledServer]:
        """Returns the running servers, only those that hold `weights` if it is given."""
        with self._changed:
            return [server for server in self.servers if server.is_up and weights in (None, server.weights)]

    def wait_for_any(self) -> list[PooledServer]:
        """Waits for at least one running server that is not suspect and returns all of them.

        Raises:
            ServersLostError: no server came up within the limit.
        """
        with self._changed:
            if not self._changed.wait_for(self._sound, self.settings.wait):
                raise self._lost()
            return self._sound()

    @contextmanager
    def lease(self, weights: str, stopped: threading.Event | None = None) -> Iterator[PooledServer]:
        """Yields the least loaded server that holds `weights` and has room for a request; waits for one.

        Raises:
            WeightsLostError: servers are up, but none of them holds `weights`.
            ServersLostError: no server came up within the limit, or `stopped` was set during the wait.
        """
        deadline = time.monotonic() + self.settings.wait
        with self._changed:
            while (server := self._least_loaded(weights)) is None:
                up = [server for server in self.servers if server.is_up]
                if up and not any(server.weights == weights for server in up):
                    raise WeightsLostError(f"no server holds the weights {weights}; {len(up)} are waiting for them")
                if up:
                    deadline = time.monotonic() + self.settings.wait
                if time.monotonic() >= deadline or self._closing.is_set() or (stopped and stopped.is_set()):
                    raise self._lost()
                self._changed.wait(min(1.0, max(0.01, deadline - time.monotonic())))
            server.in_flight += 1
        try:
            yield server
        finally:
            with self._changed:
                server.in_flight -= 1
                self._changed.notify_all()

    def client_for(self, server: PooledServer, weights: str) -> SGLangClient:
        """Returns the client for a request with `weights` under a lease of `server`: the router if all its servers hold
        them, otherwise `server`.
        """
        with self._changed:
            all_ready = all(one.is_up and one.weights == weights for one in self.servers)
        if self.router and all_ready and time.monotonic() >= self._router_back_at:
            return self.router
        return server.http

    def pass_over_router(self) -> None:
        """Bypasses the router for a while after a failure, so that a faulty server can be identified."""
        self._router_back_at = time.monotonic() + ROUTER_PAUSE_SECONDS

    def set_weights(self, server: PooledServer, weights: str | None) -> None:
        """Records the weights that `server` holds."""
        with self._changed:
            server.weights = weights
            self._changed.notify_all()

    def suspect(self, server: PooledServer) -> None:
        """Sends nothing more to `server`, where a request or a sync failed, until an immediate check succeeds."""
        with self._changed:
            server.is_suspect = True
        server.look_now.set()

    def abort_all(self) -> None:
        """Aborts all generation on every server."""
        for server in self.up():
            with suppress(ServerError):
                server.http.abort()

    def _sound(self) -> list[PooledServer]:
        return [server for server in self.servers if server.is_up and not server.is_suspect]

    def _least_loaded(self, weights: str) -> PooledServer | None:
        ready = [
            server
            for server in self.servers
            if server.is_up
            and not server.is_suspect
            and server.weights == weights
            and server.in_flight < self.settings.concurrency
        ]
        return min(ready, key=lambda server: server.in_flight, default=None)

    def _lost(self) -> ServersLostError:
        return ServersLostError(
            f"rollout: none of the {len(self.servers)} servers came back within {self.settings.wait:.0f} s "
            f"({', '.join(server.url for server in self.servers)}); see their logs in the run's folder, restart "
            "them or raise sglang.wait_seconds"
        )

    def _bring_up_all(self) -> None:
        """Brings up all servers at once; raises the first error without waiting for the others."""
        executor = ThreadPoolExecutor(len(self.servers), thread_name_prefix="start")
        try:
            starts = [executor.submit(self._bring_up, server) for server in self.servers]
            for start in wait(starts, return_when=FIRST_EXCEPTION).done:
                start.result()
        finally:
            executor.shutdown(wait=False)

    def _bring_up(self, server: PooledServer) -> None:
        """Waits until a server is healthy, checks its model, and adds it to the running servers."""
        if server.process:
            server.process.wait_until_healthy(self.settings.start_timeout)
            if server.client:
                server.client.close()
            server.client = server.connect(server.process.url)
        else:
            self.on_contact(server)
            server.http.check_health(timeout_seconds=self.settings.heartbeat_timeout)
        server.http.check_model(model_type=self._model_type)
        info = server.http.server_info()
        server.tp_size, server.num_replicas = info.tp_size, info.pp_size * info.dp_size
        server.is_quantized = info.quantization is not None
        weights = self.on_back(server)
        with self._changed:
            server.is_up, server.is_suspect, server.weights = True, False, weights
            server.incarnation += 1
            self._changed.notify_all()
        self.on_up(server)

    def _keep(self, server: PooledServer) -> None:
        """Watches one server until the pool closes."""
        missed, back_off = 0, 1.0
        while not self._closing.is_set():
            server.look_now.wait(self.settings.heartbeat if server.is_up else back_off)
            server.look_now.clear()
            if self._closing.is_set():
                return
            if not server.is_up and not self.may_start:
                missed, back_off = 0, 1.0
            elif not server.is_up:
                back_off = 1.0 if self._revive(server) else min(2 * back_off, MAX_BACK_OFF_SECONDS)
                missed = 0
            elif self._is_alive(server):
                missed = 0
                self._clear(server)
            else:
                missed += 1
                gone = server.process is not None and not server.process.is_running
                if gone or missed >= self.settings.missed_heartbeats:
                    self.take_down(server, "its process ended" if gone else f"{missed} heartbeats missed")
                else:  # check again soon, but not at once: the failure may be transient
                    self._closing.wait(min(MISSED_PAUSE_SECONDS, self.settings.heartbeat))
                    server.look_now.set()

    def _is_alive(self, server: PooledServer) -> bool:
        if server.process and not server.process.is_running:
            return False
        if server.busy_with_sync:  # it cannot answer during a sync, which has its own time-outs
            return True
        try:
            server.http.check_alive(timeout_seconds=self.settings.heartbeat_timeout)
        except ServerError:
            return server.busy_with_sync
        return True

    def _clear(self, server: PooledServer) -> None:
        if server.is_suspect:
            with self._changed:
                server.is_suspect = False
                self._changed.notify_all()

    def take_down(self, server: PooledServer, reason: str) -> None:
        """Counts `server` as dead, until the thread that watches it brings it back."""
        with self._changed:
            if not server.is_up:
                return
            server.is_up, server.weights = False, None
            self.num_lost += 1
            self._changed.notify_all()
        logger.warning("server %s is lost: %s; other servers take its unfinished prompts", server.url, reason)
        old, server.client = server.http, server.connect(server.url)
        old.close()  # no later request reuses its connections
        server.look_now.set()

    def _revive(self, server: PooledServer) -> bool:
        """Tries to bring back a dead server, with weights if the transport kept them; returns whether it succeeded."""
        try:
            if server.process:
                server.process.start()
                if not self.may_start:  # since a moment ago
                    server.process.stop()
                    return False
                with self._changed:
                    self.num_restarts += 1
            self._bring_up(server)
        except (EngineError, OSError) as error:
            if not self._closing.is_set():
                logger.warning("server %s is not back: %s", server.url, error)
            return False
        logger.warning("server %s is back", server.url)
        return True
