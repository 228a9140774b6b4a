"""SGLang servers of our own: start, wait until healthy, and end."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from megatron_tip.errors import OptionalDependencyError, ServerError
from megatron_tip.parallel.environment import LOOPBACK, SPIN_COUNT, free_port
from megatron_tip.placement.hosts import device_names
from megatron_tip.rollout.sglang.client import SGLangClient, Timeouts
from megatron_tip.rollout.sglang.keys import ServerKeys

CPU_SHIM = Path(__file__).parent / "cpu_shim"
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_WAIT_POLICY": "passive",  # spinning threads take the trainer's cores, but
    "GOMP_SPINCOUNT": SPIN_COUNT,  # a short wait helps: a decode step has hundreds of parallel regions
    "TORCHDYNAMO_DISABLE": "1",  # it would look for the real triton
}
_WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_")


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server.

    `model_path`: Hugging Face directory; with `dummy_weights` only its config.json is read, and the weights are random
    until the first sync. `log_path`: for the server's output. `threads`: CPU threads per rank. `gpus`: ids of those
    that it may see, as `visible_gpus` counts them; empty: those of this process. `max_total_tokens`: of its cache; 0:
    as many as `memory_fraction` allows. `memory_saver`: it can give back its memory for a while; on GPUs only. `seed`:
    of its sampling; servers of one run need different ones. `extra_arguments`: further SGLang arguments.
    """

    model_path: Path
    log_path: Path
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    host: str = "127.0.0.1"
    tp_size: int = 1
    threads: int = 1
    gpus: tuple[int, ...] = ()
    max_total_tokens: int = 0
    memory_fraction: float = 0.0
    context_length: int = 0
    dummy_weights: bool = False
    memory_saver: bool = False
    seed: int = 0
    extra_arguments: tuple[str, ...] = ()
    keys: ServerKeys = field(default_factory=ServerKeys, repr=False)

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


def require_sglang() -> None:
    """Raises OptionalDependencyError if SGLang is not installed alongside this package."""
    if importlib.util.find_spec("sglang") is None:
        raise OptionalDependencyError(
            "rollout.engine: expected SGLang beside this package, found none; run `make sglang-cpu`, on a GPU machine "
            'pip install "megatron_tip[sglang]", or name running servers in rollout.server_urls'
        )


class SGLangServer:
    """One server process. `start` returns at once; `wait_until_healthy` when it answers; `stop` ends it.

    It also ends when the process that started it ends in any way. As a context manager it is started and healthy
    inside.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process on a free port.

        Raises:
            OptionalDependencyError: SGLang is not installed.
        """
        require_sglang()
        self.stop()
        settings, port = self.settings, free_port(self.settings.host)
        self.url = f"http://{_reachable(settings.host)}:{port}"
        settings.log_path.parent.mkdir(parents=True, exist_ok=True)
        log = settings.log_path.open("ab")
        secret = [key.encode() for key in (settings.keys.api, settings.keys.admin) if key]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_tip.rollout.sglang.main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if secret else log,
            stderr=subprocess.STDOUT,
            env=server_environment(settings, os.environ),
            start_new_session=True,  # its own process group, to be ended as one
        )
        assert process.stdin is not None, "stdin is a pipe"
        self._process = process
        with suppress(BrokenPipeError):  # it died at once; wait_until_healthy reports it
            process.stdin.write(json.dumps(server_arguments(settings, port)).encode() + b"\n")
            process.stdin.flush()
        if secret:
            assert process.stdout is not None, "stdout is a pipe"
            threading.Thread(target=_copy_redacted, args=(process.stdout, log, secret), daemon=True).start()
        else:
            log.close()

    def wait_until_healthy(self, timeout_seconds: float = 300.0) -> float:
        """Returns the seconds it took until the server generated.

        Raises:
            ServerError: the server ended or is not healthy in time, and is stopped; with the last lines of its log.
        """
        begin = time.monotonic()
        with SGLangClient(self.url, vocab_size=1, keys=self.settings.keys, timeouts=Timeouts(connect=2.0)) as client:
            while time.monotonic() - begin < timeout_seconds:
                if not self.is_running:
                    self.stop()
                    raise ServerError(f"{self.url}: the server ended while it started:\n{self.log_tail()}")
                with suppress(ServerError):
                    client.check_health(timeout_seconds=10.0)
                    return time.monotonic() - begin
                time.sleep(0.25)
        self.stop()
        raise ServerError(f"{self.url}: not healthy within {timeout_seconds:.0f} s:\n{self.log_tail()}")

    def log_tail(self, num_lines: int = 15) -> str:
        """Returns the last lines of its log, which has no passwords."""
        try:
            lines = self.settings.log_path.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-num_lines:])

    def stop(self) -> None:
        """Ends the server with all its processes; does nothing if it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it holds nothing that needs saving
        with suppress(BrokenPipeError):
            assert process.stdin is not None, "stdin is a pipe"
            process.stdin.close()
        process.wait()

    def __enter__(self) -> Self:
        self.start()
        self.wait_until_healthy()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()


def server_arguments(settings: ServerSettings, port: int) -> list[str]:
    """Returns SGLang's command line for `settings`; it holds the passwords and is never shown."""
    arguments = {
        "--model-path": settings.model_path,
        "--device": settings.device,
        "--dtype": settings.dtype,
        "--host": settings.host,
        "--port": port,
        "--tp-size": settings.tp_size,
        "--random-seed": settings.seed,
        "--max-total-tokens": settings.max_total_tokens or None,
        "--mem-fraction-static": settings.memory_fraction or None,
        "--context-length": settings.context_length or None,
        "--load-format": "dummy" if settings.dummy_weights else None,
        "--api-key": settings.keys.api,
        "--admin-api-key": settings.keys.admin,
    }
    if settings.device == "cpu":
        arguments |= {"--attention-backend": "torch_native", "--sampling-backend": "pytorch"}
    # Without the last flag an idle scheduler spins on a core that the trainer needs.
    flags = ["--skip-tokenizer-init", "--incremental-streaming-output", "--sleep-on-idle"]
    if settings.memory_saver:
        flags.append("--enable-memory-saver")
    pairs = [[name, str(value)] for name, value in arguments.items() if value is not None]
    return [*(part for pair in pairs for part in pair), *flags, *settings.extra_arguments]


def server_environment(settings: ServerSettings, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns `environment` without the trainer's world, and with what SGLang needs on its device."""
    kept = {name: value for name, value in environment.items() if not name.startswith(_WORLD_VARIABLES)}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(settings.threads)}
    package_root = str(Path(__file__).parents[2])
    paths = [package_root, *filter(None, [kept.get("PYTHONPATH")])]
    if settings.device == "cpu":
        kept |= CPU_ENVIRONMENT
        paths.insert(0, str(CPU_SHIM))
        if settings.tp_size > 1:
            kept["SGLANG_CPU_OMP_THREADS_BIND"] = _bound_cores(settings.tp_size, sorted(os.sched_getaffinity(0)))
    elif settings.gpus:
        kept["CUDA_VISIBLE_DEVICES"] = device_names(settings.gpus, environment)
    return kept | {"PYTHONPATH": os.pathsep.join(paths)}


def _bound_cores(tp_size: int, cores: Sequence[int]) -> str:
    """Returns the cores of each rank in SGLang's notation, "0|1"; ranks share cores if there are too few."""
    share = max(1, len(cores) // tp_size)
    starts = [(rank * share) % len(cores) for rank in range(tp_size)]
    return "|".join(",".join(map(str, cores[start : start + share])) for start in starts)


def _reachable(host: str) -> str:
    """Returns the name under which this process reaches a server that is bound to `host`."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _copy_redacted(source: IO[bytes], log: IO[bytes], secret: Sequence[bytes]) -> None:
    """Copies lines without the passwords: SGLang logs its arguments, which include them.

    Keeps reading even if it cannot write: a pipe that nobody reads would block the server.
    """
    with suppress(OSError), log:
        for line in source:
            for key in secret:
                line = line.replace(key, b"***")
            with suppress(OSError):
                log.write(line)
                log.flush()
