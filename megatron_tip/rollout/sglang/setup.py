"""Construction of an SGLang engine from a configuration: our own or given servers, and the weight transport."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch

from megatron_tip.config import Config
from megatron_tip.conversion.model_folder import ModelFolder
from megatron_tip.conversion.model_size import num_parameters
from megatron_tip.errors import ConfigError
from megatron_tip.files import new_folder
from megatron_tip.machine import Machine
from megatron_tip.parallel.environment import expands_segments
from megatron_tip.rollout.engine import EngineNeeds
from megatron_tip.rollout.handover.shared_memory import bucket_limit
from megatron_tip.rollout.sglang.client import SGLangClient, Timeouts
from megatron_tip.rollout.sglang.engine import EngineSettings, SGLangEngine, new_run_id
from megatron_tip.rollout.sglang.keys import ServerKeys, new_keys, read_keys
from megatron_tip.rollout.sglang.pool import PooledServer, PoolSettings, ServerPool
from megatron_tip.rollout.sglang.server import ServerSettings, SGLangServer, require_sglang
from megatron_tip.rollout.sglang.weights.broadcast import BroadcastTransport
from megatron_tip.rollout.sglang.weights.folder import FolderTransport
from megatron_tip.rollout.sglang.weights.ipc import IpcTransport
from megatron_tip.rollout.sglang.weights.transport import WeightTransport
from megatron_tip.seeds import derive_seed


def check_sglang(config: Config) -> None:
    """Raises ConfigError if settings of SGLang servers do not fit together. Reads no files."""
    rollout, sglang = config.rollout, config.sglang
    if rollout.top_p != 1.0:
        raise ConfigError(
            f'rollout.top_p: expected 1 with rollout.engine = "sglang", got {rollout.top_p}; SGLang reports logprobs '
            "under the whole distribution, not under the nucleus that it samples from"
        )
    if sglang.router_url and not rollout.server_urls:
        raise ConfigError(
            "sglang.router_url: expected rollout.server_urls as well, got none; weights go directly to the servers"
        )
    if rollout.server_urls:
        urls = [*rollout.server_urls, *filter(None, [sglang.router_url])]
        bad = [url for url in urls if not url.startswith(("http://", "https://"))]
        if bad:
            name = "sglang.router_url" if bad[0] == sglang.router_url else "rollout.server_urls"
            raise ConfigError(f'{name}: expected "http://host:port", got {bad[0]!r}')


def check_served(config: Config, vocab_sizes: Sequence[int], machine: Machine) -> None:
    """Refuses settings that servers do not support; see `EngineKind.check`.

    Raises:
        ConfigError: settings do not fit together, or passwords are unreadable.
        OptionalDependencyError: our own servers are configured, but SGLang is not installed.
    """
    check_sglang(config)
    keys_file = config.sglang.keys_file
    if not config.rollout.server_urls:
        with machine.lacks_packages():
            require_sglang()
    elif keys_file is not None and machine.has(keys_file, "sglang.keys_file"):
        read_keys(keys_file)
    student, teacher = vocab_sizes
    if student > teacher:
        raise ConfigError(
            f'rollout.engine = "sglang": expected a student whose vocabulary is not larger than the teacher\'s, got '
            f"{student} and {teacher} entries; a server would sample ids that the teacher does not know: use the "
            "embedded engine"
        )


def check_allocator(transport: str | None, device: torch.device, environ: Mapping[str, str]) -> None:
    """Raises ConfigError if torch's allocator in this process takes memory that CUDA IPC cannot share."""
    if transport == "ipc" and device.type == "cuda" and expands_segments(environ):
        raise ConfigError(
            "PYTORCH_CUDA_ALLOC_CONF: expected no expandable_segments:True in the trainer's environment with "
            'sync.transport = "ipc", got it; CUDA IPC cannot share such memory: unset it, or set sync.transport = '
            '"broadcast"'
        )


def build_sglang_engine(needs: EngineNeeds) -> SGLangEngine:
    """Returns the engine with its servers started, healthy and checked, but without weights.

    Our own servers use the first process's type of device.

    Raises:
        ServerError, ServerMismatchError: a server does not start, does not answer, or serves another model.
        OutputError: the run's folder is not writable.
        ConfigError: see `check_allocator`.
    """
    check_allocator(needs.placement.transport, needs.device, os.environ)
    config, student = needs.config, needs.student
    rollout, sglang = config.rollout, config.sglang
    run_id = new_run_id()
    keys = read_keys(sglang.keys_file) if rollout.server_urls else new_keys(sglang.host)
    connect = _connector(config, student, keys)
    servers = [PooledServer(connect, url=url) for url in rollout.server_urls]
    if not servers:
        own = _own_servers(needs, keys)
        servers = [PooledServer(connect, process=SGLangServer(server)) for server in own]
    if needs.placement.transport == "ipc":
        for server, placed in zip(servers, needs.placement.students, strict=True):
            server.neighbours = placed.neighbours
    pool = ServerPool(
        servers,
        PoolSettings(
            concurrency=sglang.concurrency,
            heartbeat=sglang.heartbeat_seconds,
            start_timeout=sglang.start_seconds,
            wait=sglang.wait_seconds,
        ),
        model_type=student.config["model_type"],
        router=connect(sglang.router_url) if sglang.router_url else None,
    )
    settings = EngineSettings(
        run_id=run_id,
        attempts=rollout.attempts,
        set_aside_path=config.run.folder / "set_aside.jsonl",
        num_layers=student.architecture.num_layers,
        drop_wrong_version=rollout.on_wrong_version == "drop",
        releases_memory=needs.releases_memory,
        show=needs.show,
    )
    return SGLangEngine(pool, _transport(needs, run_id), settings)


def _connector(config: Config, student: ModelFolder, keys: ServerKeys) -> Callable[[str], SGLangClient]:
    """Returns a function that creates a client from a server's URL, always with the same `keys`."""
    sglang = config.sglang
    num_at_once = sglang.concurrency * (len(config.rollout.server_urls) if sglang.router_url else 1)
    return partial(
        SGLangClient,
        vocab_size=student.architecture.vocab_size,
        keys=keys,
        timeouts=Timeouts(silence=sglang.silence_seconds, control=config.sync.timeout_seconds),
        max_connections=num_at_once + 16,  # 16 for heartbeats and weight calls
    )


def _own_servers(needs: EngineNeeds, keys: ServerKeys) -> list[ServerSettings]:
    """Returns the settings of servers with the student's architecture; the first sync brings their weights."""
    config, dtype = needs.config, needs.dtype
    rollout, sglang = config.rollout, config.sglang
    description = config.run.folder / "servers" / "model"
    with new_folder(description, overwrite=True) as folder:
        needs.student.write_description(folder, dtype)
    batch = max(rollout.prompts_per_step * rollout.samples_per_prompt, config.heldout.num_prompts)
    name: Literal["float32", "bfloat16"] = "float32" if dtype == torch.float32 else "bfloat16"
    cpu_tokens = min(batch, sglang.concurrency) * config.longest_sequence + 256
    return [
        ServerSettings(
            model_path=description.absolute(),
            log_path=config.run.folder / "servers" / f"server_{server.index}.log",
            dtype=name,
            device="cuda" if server.gpus_on(0) else "cpu",
            host=sglang.host,
            tp_size=len(server.places),
            threads=sglang.threads,
            gpus=server.gpus_on(0),
            max_total_tokens=sglang.max_total_tokens or (0 if server.gpus_on(0) else cpu_tokens),
            memory_fraction=server.memory_fraction,
            memory_saver=needs.releases_memory and bool(server.gpus_on(0)),
            dummy_weights=True,
            seed=derive_seed(config.run.seed, 3, server.index) % 2**31,
            extra_arguments=sglang.arguments,
            keys=keys,
        )
        for server in needs.placement.students
    ]


def _transport(needs: EngineNeeds, run_id: str) -> WeightTransport:
    config, device, sync = needs.config, needs.device, needs.config.sync
    if needs.placement.transport == "folder":
        folder = sync.folder or config.run.folder / "weights"
        owner = hashlib.sha256(str(config.run.folder.absolute()).encode()).hexdigest()[:12]
        return FolderTransport(
            folder, needs.student, dtype=needs.weights_dtype, bucket_bytes=sync.bucket_bytes, owner=owner
        )
    if needs.placement.transport == "ipc":
        if needs.exchange is not None:
            return IpcTransport(bucket_bytes=needs.exchange.bucket_bytes, device=device, exchange=needs.exchange)
        model_bytes = num_parameters(needs.student.architecture) * needs.weights_dtype.itemsize
        limit = bucket_limit(sync.bucket_bytes, model_bytes, device, num_handing=1)
        return IpcTransport(bucket_bytes=limit, device=device)
    return BroadcastTransport(
        run_id=run_id,
        bucket_bytes=sync.bucket_bytes,
        backend="nccl" if device.type == "cuda" else "gloo",
        device=device,
        timeout_seconds=sync.timeout_seconds,
    )
