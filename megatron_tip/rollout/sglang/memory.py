"""The device memory that servers beside a trainer hold: given back while it trains, taken back before they work."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from megatron_tip.errors import ServerError, ServerMismatchError
from megatron_tip.rollout.engine import ALL_MEMORY, CACHE, WEIGHTS
from megatron_tip.rollout.sglang.pool import PooledServer, ServerPool

logger = logging.getLogger(__name__)

_TAGS = {WEIGHTS: ("weights",), CACHE: ("kv_cache", "cuda_graph")}
"""SGLang's names. Its captured graphs keep buffers of their own, which are of use only together with the cache; it
gives them back only with SGLANG_MEMORY_SAVER_CUDA_GRAPH=1 in its environment, otherwise it keeps them."""

_IDLE_SECONDS = 20.0
"""How long a server's aborted requests may take to end."""

_MAX_THREADS = 32


@dataclass
class _State:
    """What one server holds. `is_known`: False after a call of which nobody knows whether it took effect."""

    held: frozenset[str] = ALL_MEMORY
    is_known: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)


class ServerMemory:
    """The memory of a pool's servers. A server that fails to give back or take back is taken down like any dead one.

    SGLang ends a server that is told to give back what it has given back already, and the other way round. So what each
    holds is recorded here, and a given server in doubt is left out until somebody restarts it.

    Args:
        run_id: what every weight version of this run begins with; a server that was restarted has another.
    """

    def __init__(self, pool: ServerPool, *, run_id: str) -> None:
        self._pool = pool
        self._run_id = run_id
        self._wanted = ALL_MEMORY
        self._states = {server: _State() for server in pool.servers}
        pool.on_contact = self._reclaim
        pool.on_up = self._apply

    def hold(self, held: frozenset[str], *, may_start: bool) -> None:
        """Makes every running server hold exactly `held`; see `RolloutEngine.hold_memory`.

        Servers of our own that are starting are ended if they may not start: they would take what they gave back.
        """
        self._wanted = held
        self._pool.may_start = may_start
        for server in self._pool.servers:
            if not server.is_up and may_start:
                server.look_now.set()
            elif not server.is_up and server.process:
                server.process.stop()
        servers = self._pool.up()  # after the loop, because one that it saw starting may have come up since
        with ThreadPoolExecutor(max(1, min(len(servers), _MAX_THREADS)), thread_name_prefix="memory") as executor:
            list(executor.map(self._apply, servers))

    def restore(self, timeout_seconds: float) -> None:
        """Makes given servers hold everything again, for those who use them next; logs those that do not.

        A health check by anyone else would end a server without its cache.
        """
        self._wanted = ALL_MEMORY
        given = [server for server in self._pool.servers if server.process is None]
        if not given:
            return
        executor = ThreadPoolExecutor(min(len(given), _MAX_THREADS), thread_name_prefix="memory")
        calls = {executor.submit(self._apply if one.is_up else self._reclaim, one): one for one in given}
        done, late = wait(calls, timeout_seconds)
        executor.shutdown(wait=False, cancel_futures=True)
        for call in done:
            if error := call.exception():
                logger.warning("%s: could not take its memory back: %s", calls[call].url, error)
        for call in late:
            logger.warning("%s: did not take its memory back within %.0f s", calls[call].url, timeout_seconds)

    def check(self, server: PooledServer) -> None:
        """Marks a new server, so that it is known again, and refuses one that cannot give back its memory.

        Raises:
            ServerMismatchError: a given server on a GPU was started without SGLang's memory saver.
        """
        if server.process:
            self._states[server] = _State()
        info = server.http.server_info()
        if info.device == "cuda" and not info.enable_memory_saver:
            raise ServerMismatchError(
                f"{server.url}: expected a server started with --enable-memory-saver, because sglang.release_memory "
                "makes it give back its memory while the trainer trains, got one without; restart it, or set "
                'sglang.release_memory = "never"'
            )
        if not self._is_ours(server):
            server.http.weights_endpoint(
                "update_weight_version", {"new_version": f"{self._run_id}/none", "abort_all_requests": False}
            )

    def _is_ours(self, server: PooledServer) -> bool:
        return server.http.model_info().weight_version.startswith(f"{self._run_id}/")

    def _apply(self, server: PooledServer) -> None:
        """Brings one server to what is wanted now."""
        state = self._states[server]
        with state.lock:
            wanted = self._wanted
            leaving, coming = state.held - wanted, wanted - state.held
            try:
                if leaving:
                    server.http.end_requests(timeout_seconds=_IDLE_SECONDS)  # SGLang ends a server that has some
                state.is_known = False
                if leaving:
                    server.http.move_memory("release", _tags(leaving))
                if coming:
                    server.http.move_memory("resume", _tags(coming))
                state.held, state.is_known = wanted, True
            except ServerError as error:
                logger.warning("%s: could not %s its memory: %s", server.url, "release" if leaving else "take", error)
                self._pool.take_down(server, "it does not do as it is told with its memory")
                if server.process:
                    server.process.stop()  # frees what it holds; it is started again when servers may
                return
        if WEIGHTS in leaving:
            self._pool.set_weights(server, None)

    def _reclaim(self, server: PooledServer) -> None:
        """Makes a given server that was cut off hold everything again, as the checks of a returned one need.

        Raises:
            ServerError: it is the same process, and either does not answer or is in doubt.
        """
        state = self._states[server]
        with state.lock:
            if state.held == ALL_MEMORY and state.is_known:
                return
            if self._is_ours(server):
                if not state.is_known:
                    raise ServerError(
                        f"{server.url}: nobody knows what memory it holds, since a call about it failed; restart it"
                    )
                state.is_known = False
                server.http.move_memory("resume", _tags(ALL_MEMORY - state.held))
            state.held, state.is_known = ALL_MEMORY, True


def _tags(parts: frozenset[str]) -> list[str]:
    return [tag for part in sorted(parts) for tag in _TAGS[part]]
