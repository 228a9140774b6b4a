"""Generation and weight sync: SGLang on the CPU against the embedded engine, in one run.

    python tools/bench_rollout.py [--requests 16] [--tokens 64] [--repeats 3] [--threads 2] [--json]

The model is the quickstart's student (SmolLM2-135M-Instruct without layers 20 to 25, float32), the prompts are its
arithmetic questions. Both engines answer the same prompts, `--requests` of them at once, with `--tokens` tokens each
(no stop ids), one engine after the other, by turns; tokens a second are the median over `--repeats` turns.

Seconds to healthy: from the start of the server's process until it generates. Sync: seconds and bytes of bringing all
weights to the engine, in place (embedded), by broadcast over gloo, and through a folder; the median over `--repeats`.
Memory: resident bytes of this process, with student and embedded engine in it, and of the server's processes together,
pages that they share counted in each.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from megatron_tip.config import HeldoutConfig, PromptsConfig
from megatron_tip.conversion.model_folder import new_folder
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.conversion.weight_map import hf_shapes
from megatron_tip.records import Prompt
from megatron_tip.rollout.embedded_engine import EmbeddedEngine
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams
from megatron_tip.rollout.prompts import load_prompts
from megatron_tip.rollout.sglang_client import SGLangClient
from megatron_tip.rollout.sglang_engine import EngineSettings, SGLangEngine, new_run_id
from megatron_tip.rollout.sglang_pool import PooledServer, PoolSettings, ServerPool
from megatron_tip.rollout.sglang_server import ServerSettings, SGLangServer
from megatron_tip.rollout.weight_broadcast import BroadcastTransport
from megatron_tip.rollout.weight_folder import FolderTransport

TEACHER = Path(".cache/quickstart/SmolLM2-135M-Instruct")
DROPPED_LAYERS = range(20, 26)


@dataclass
class Measured:
    """`tokens_per_second`, `sync_seconds`, `sync_bytes`: by engine or way. Bytes are of memory."""

    seconds_to_healthy: float
    tokens_per_second: dict[str, float]
    sync_seconds: dict[str, float]
    sync_bytes: dict[str, int]
    trainer_bytes: int
    server_bytes: int


def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens a request.")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of either engine.")] = 2,
    model: Annotated[Path, typer.Option(help="The unpruned model's directory.")] = TEACHER,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compares SGLang with the embedded engine."""
    torch.set_num_threads(threads)
    student = HfCheckpoint(model, tuple(DROPPED_LAYERS))
    weights = {name: student.read(name).float() for name in hf_shapes(student.architecture)}
    prompts = prompts_of(model, requests)
    sampling = SamplingParams(tokens, 1.0, 1.0, 1, (), seed=1, batch_name="bench")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(student, weights, prompts, sampling, repeats, threads, Path(folder))
    if as_json:
        print(json.dumps(asdict(measured)))
    else:
        show(measured, requests, tokens)


def prompts_of(model: Path, number: int) -> list[Prompt]:
    """The quickstart's questions, tokenised."""
    config = PromptsConfig(source="reasoning_gym", tasks=("basic_arithmetic",), max_prompt_tokens=256)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    heldout = HeldoutConfig(num_prompts=0)
    return load_prompts(config, heldout, tokenizer, prompts_per_step=number, steps=1, seed=1).batch(1)


def measure(
    student: HfCheckpoint,
    weights: dict[str, Tensor],
    prompts: list[Prompt],
    sampling: SamplingParams,
    repeats: int,
    threads: int,
    folder: Path,
) -> Measured:
    """Starts both engines, syncs each way and generates by turns."""
    embedded = EmbeddedEngine(AutoConfig.for_model(**student.config), batch_size=len(prompts), num_threads=threads)
    server = own_server(student, folder, threads, len(prompts) * (256 + sampling.max_response_tokens))
    run_id = new_run_id()
    broadcast = BroadcastTransport(
        run_id=run_id, bucket_bytes=134_217_728, backend="gloo", device="cpu", timeout_seconds=120.0
    )
    by_folder = FolderTransport(folder / "weights", student, dtype=torch.float32, bucket_bytes=134_217_728)
    pool = ServerPool([server], PoolSettings(concurrency=len(prompts)), model_type=student.config["model_type"])
    begin = time.monotonic()
    sglang = SGLangEngine(pool, broadcast, EngineSettings(run_id, 4, folder / "set_aside.jsonl"))
    seconds_to_healthy = time.monotonic() - begin
    try:
        sync_seconds = {"in place": median_of(repeats, lambda: embedded.update_weights(stream(weights), 0))}
        sglang._transport = by_folder
        sync_seconds["folder"] = median_of(repeats, lambda: sglang.update_weights(stream(weights), 0))
        sglang._transport = broadcast
        sync_seconds["broadcast"] = median_of(repeats, lambda: sglang.update_weights(stream(weights), 0))
        in_place = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        sync_bytes = {"in place": in_place, "folder": by_folder.num_bytes, "broadcast": broadcast.num_bytes}
        speeds = by_turns({"embedded": embedded, "sglang": sglang}, prompts, sampling, repeats)
        return Measured(
            seconds_to_healthy=seconds_to_healthy,
            tokens_per_second=speeds,
            sync_seconds=sync_seconds,
            sync_bytes=sync_bytes,
            trainer_bytes=psutil.Process().memory_info().rss,
            server_bytes=sum(process.memory_info().rss for process in processes_of(server)),
        )
    finally:
        sglang.close()
        by_folder.close()


def own_server(student: HfCheckpoint, folder: Path, threads: int, max_total_tokens: int) -> PooledServer:
    with new_folder(folder / "model") as description:
        student.write_description(description, torch.float32)
    settings = ServerSettings(
        model_path=folder / "model",
        log_path=folder / "server.log",
        threads=threads,
        max_total_tokens=max_total_tokens,
        memory_fraction=0.5,
        dummy_weights=True,
    )
    vocab_size = student.architecture.vocab_size
    return PooledServer(lambda url: SGLangClient(url, vocab_size=vocab_size), process=SGLangServer(settings))


def stream(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from weights.items()


def by_turns(
    engines: dict[str, RolloutEngine], prompts: list[Prompt], sampling: SamplingParams, repeats: int
) -> dict[str, float]:
    """Median tokens a second of each engine, behind one turn that is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats + 1):
        for name, engine in engines.items():
            begin = time.monotonic()
            rollouts = engine.generate(prompts, sampling)
            count = sum(len(rollout.response_ids) for rollout in rollouts)
            speeds[name].append(count / (time.monotonic() - begin))
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}


def median_of(repeats: int, action: Callable[[], None]) -> float:
    """Median seconds of `action`, behind one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.monotonic()
        action()
        seconds.append(time.monotonic() - begin)
    return statistics.median(seconds[1:])


def processes_of(server: PooledServer) -> list[psutil.Process]:
    assert server.process is not None, "the server is ours"
    main_process = psutil.Process(server.process.pid)
    return [main_process, *main_process.children(recursive=True)]


def show(measured: Measured, requests: int, tokens: int) -> None:
    table = Table(title=f"{requests} requests at once, {tokens} new tokens each")
    for column in ("", "tokens a second", "sync seconds", "sync MB"):
        table.add_column(column, justify="left" if not column else "right")
    speeds, seconds, sizes = measured.tokens_per_second, measured.sync_seconds, measured.sync_bytes
    rows = (("embedded", "in place"), ("sglang", "broadcast"), ("sglang", "folder"))
    for engine, way in rows:
        name = f"{engine}, {way}"
        table.add_row(name, f"{speeds[engine]:.1f}", f"{seconds[way]:.2f}", f"{sizes[way] / 1e6:.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"first healthy after {measured.seconds_to_healthy:.1f} s; resident: trainer "
        f"{measured.trainer_bytes / 1e9:.2f} GB, server {measured.server_bytes / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    typer.run(main)
