"""Whole training runs in processes that can be killed; forked from a server that has imported everything once."""

import multiprocessing
import os
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tip.config import Config
from megatron_tip.observability.metrics_file import MEASURED, read_metrics
from megatron_tip.training.loop import train


@dataclass(frozen=True)
class Workers:
    """The workers of one start of a run. What a worker raised is in `log`/rank.error, with its traceback."""

    processes: list[Any]
    log: Path

    @classmethod
    def start(cls, config: Config, world_size: int, log: Path, *, fresh: bool = False) -> "Workers":
        log.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "megatron_tip.training.loop"])
        processes = [
            context.Process(target=_work, args=(config, rank, world_size, port, str(log), fresh), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        return cls(processes, log)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self) -> list[int]:
        """The exit codes, when all have ended."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def errors(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.log.glob("*.error")))


def run_to_end(config: Config, world_size: int, log: Path) -> None:
    workers = Workers.start(config, world_size, log)
    assert workers.wait() == [0] * world_size, workers.errors()


def _work(config: Config, rank: int, world_size: int, port: int, log: str, fresh: bool) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    stream = os.open(os.path.join(log, f"{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 2)
    try:
        train(config, fresh=fresh)
    except BaseException:
        Path(log, f"{rank}.error").write_text(traceback.format_exc())
        raise


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what differs between two runs of the same numbers."""
    lines = read_metrics(folder / "metrics.jsonl")  # a run may be writing it
    return [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in lines]


def weights_of(folder: Path) -> bytes:
    return (folder / "hf" / "model.safetensors").read_bytes()


def assert_same_run(folder: Path, expected: Path) -> None:
    """Metrics and final weights are the same, bit for bit."""
    assert metrics_of(folder) == metrics_of(expected)
    assert weights_of(folder) == weights_of(expected)
