"""Generation and weight sync: SGLang on the CPU against the embedded engine, in one run.

    python tools/bench_rollout.py [--requests 16] [--tokens 64] [--repeats 3] [--threads 2]
        [--dtype float32] [--json]

The model is the pruned pair's student (SmolLM2-135M-Instruct without layers 20 to 25, float32), the prompts are its
arithmetic questions. Both engines answer the same prompts, `--requests` of them at once, with `--tokens` tokens each
(no stop ids). The engines take turns; tokens per second are the median over `--repeats` turns. Each turn is printed to
standard error when it ends. `--dtype` sets both engines' weights; the student's are float32.

Seconds to healthy: from the start of the server's process until it generates. Sync: seconds and bytes to bring all
weights to the engine, in place (embedded), by broadcast over gloo, by IPC (shared memory), and through a folder; the
median over `--repeats`, checksums included.
Memory: resident bytes of this process, which contains the student and the embedded engine, and of all the server's
processes together; pages that processes share are counted in each.
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
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
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.conversion.weight_map import hf_shapes
from megatron_tip.cpu.onednn import use_faster_products
from megatron_tip.files import new_folder
from megatron_tip.prompts.source import load_prompts
from megatron_tip.records import Prompt
from megatron_tip.rollout.embedded.engine import EmbeddedEngine
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.engine import EngineSettings, SGLangEngine, new_run_id
from megatron_tip.rollout.sglang.pool import PooledServer, PoolSettings, ServerPool
from megatron_tip.rollout.sglang.server import ServerSettings, SGLangServer
from megatron_tip.rollout.sglang.weights.broadcast import BroadcastTransport
from megatron_tip.rollout.sglang.weights.folder import FolderTransport
from megatron_tip.rollout.sglang.weights.ipc import IpcTransport

TEACHER = Path(".cache/quickstart/SmolLM2-135M-Instruct")
DROPPED_LAYERS = range(20, 26)
NOT_COUNTED = " (not counted)"
BUCKET_BYTES = 134_217_728


class Dtype(StrEnum):
    """Weight types that both engines support."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass
class Measured:
    """One run's numbers. `tokens_per_second` is by engine, `sync_seconds` and `sync_bytes` by way of syncing."""

    seconds_to_healthy: float
    tokens_per_second: dict[str, float]
    sync_seconds: dict[str, float]
    sync_bytes: dict[str, int]
    trainer_bytes: int
    server_bytes: int


def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per request.")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each engine.")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="Type of the engines' weights.")] = Dtype.FLOAT32,
    model: Annotated[Path, typer.Option(help="Directory of the unpruned model.")] = TEACHER,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compare SGLang with the embedded engine."""
    torch.set_num_threads(threads)
    use_faster_products()  # as in the trainer, whose process the embedded engine shares
    student = HfCheckpoint(model, tuple(DROPPED_LAYERS))
    weights = {name: student.read(name).float() for name in hf_shapes(student.architecture)}
    prompts = prompts_of(model, requests)
    sampling = SamplingParams(tokens, 1.0, 1.0, 1, (), seed=1, batch_name="bench")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(student, weights, prompts, sampling, repeats, threads, dtype, Path(folder))
    if as_json:
        print(json.dumps(asdict(measured)))
    else:
        show(measured, requests, tokens)


def prompts_of(model: Path, number: int) -> list[Prompt]:
    """Returns the pruned pair's questions, tokenised."""
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
    dtype: Dtype,
    folder: Path,
) -> Measured:
    """Starts both engines, syncs in every way and lets the engines generate in turn."""
    config, torch_dtype = AutoConfig.for_model(**student.config), getattr(torch, dtype.value)
    embedded = EmbeddedEngine(config, dtype=torch_dtype, batch_size=len(prompts), num_threads=threads)
    server = own_server(student, folder, threads, dtype, len(prompts) * (256 + sampling.max_response_tokens))
    run_id = new_run_id()
    by_folder = FolderTransport(folder / "weights", student, dtype=torch.float32, bucket_bytes=BUCKET_BYTES)
    by_broadcast = BroadcastTransport(
        run_id=run_id, bucket_bytes=BUCKET_BYTES, backend="gloo", device="cpu", timeout_seconds=120.0
    )
    by_ipc = IpcTransport(bucket_bytes=BUCKET_BYTES, device=torch.device("cpu"))
    pool = ServerPool([server], PoolSettings(concurrency=len(prompts)), model_type=student.config["model_type"])
    settings = EngineSettings(run_id, 4, folder / "set_aside.jsonl", student.architecture.num_layers)
    begin = time.monotonic()
    sglang = SGLangEngine(pool, by_broadcast, settings)
    seconds_to_healthy = time.monotonic() - begin
    say(f"server healthy after {seconds_to_healthy:.1f} s")
    try:
        seconds = {"in place": median_sync("in place", repeats, embedded, weights)}
        sizes = {"in place": sum(tensor.numel() * tensor.element_size() for tensor in weights.values())}
        for way, transport in (("folder", by_folder), ("ipc", by_ipc), ("broadcast", by_broadcast)):
            sglang._transport = transport
            seconds[way], sizes[way] = median_sync(way, repeats, sglang, weights), transport.num_bytes
        speeds = by_turns({"embedded": embedded, "sglang": sglang}, prompts, sampling, repeats)
        return Measured(seconds_to_healthy, speeds, seconds, sizes, resident_bytes(), resident_bytes(server))
    finally:
        sglang.close()
        by_folder.close()
        by_ipc.close()


def own_server(student: HfCheckpoint, folder: Path, threads: int, dtype: Dtype, max_total_tokens: int) -> PooledServer:
    with new_folder(folder / "model") as description:
        student.write_description(description, torch.float32)
    settings = ServerSettings(
        model_path=folder / "model",
        log_path=folder / "server.log",
        threads=threads,
        dtype=dtype.value,
        max_total_tokens=max_total_tokens,
        memory_fraction=0.5,
        dummy_weights=True,
    )
    vocab_size = student.architecture.vocab_size
    return PooledServer(lambda url: SGLangClient(url, vocab_size=vocab_size), process=SGLangServer(settings))


def by_turns(
    engines: dict[str, RolloutEngine], prompts: list[Prompt], sampling: SamplingParams, repeats: int
) -> dict[str, float]:
    """Returns the median tokens per second of each engine; the first turn is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats + 1):
        for name, engine in engines.items():
            begin = time.monotonic()
            rollouts = engine.generate(prompts, sampling)
            count = sum(len(rollout.response_ids) for rollout in rollouts)
            speeds[name].append(count / (time.monotonic() - begin))
            say(f"{name}: {speeds[name][-1]:.1f} tokens/s{NOT_COUNTED if len(speeds[name]) == 1 else ''}")
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}


def median_sync(way: str, repeats: int, engine: RolloutEngine, weights: dict[str, Tensor]) -> float:
    """Returns the median seconds of a sync; the first sync is not counted."""
    seconds: list[float] = []
    for _ in range(repeats + 1):
        begin = time.monotonic()
        engine.update_weights(iter(weights.items()), 0)
        seconds.append(time.monotonic() - begin)
        say(f"sync, {way}: {seconds[-1]:.2f} s{NOT_COUNTED if len(seconds) == 1 else ''}")
    return statistics.median(seconds[1:])


def say(line: str) -> None:
    """Prints progress to standard error, apart from the results."""
    Console(stderr=True).print(line, highlight=False)


def resident_bytes(server: PooledServer | None = None) -> int:
    """Returns the resident bytes of this process, or of all processes of `server` together."""
    if server is None:
        return psutil.Process().memory_info().rss
    assert server.process is not None, "the server is ours"
    main_process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in (main_process, *main_process.children(recursive=True)))


def show(measured: Measured, requests: int, tokens: int) -> None:
    table = Table(title=f"{requests} requests at once, {tokens} new tokens each")
    for column in ("", "tokens per second", "sync seconds", "sync MB"):
        table.add_column(column, justify="left" if not column else "right")
    speeds, seconds, sizes = measured.tokens_per_second, measured.sync_seconds, measured.sync_bytes
    rows = (("embedded", "in place"), ("sglang", "broadcast"), ("sglang", "ipc"), ("sglang", "folder"))
    for engine, way in rows:
        name = f"{engine}, {way}"
        table.add_row(name, f"{speeds[engine]:.1f}", f"{seconds[way]:.2f}", f"{sizes[way] / 1e6:.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"healthy after {measured.seconds_to_healthy:.1f} s; resident: trainer "
        f"{measured.trainer_bytes / 1e9:.2f} GB, server {measured.server_bytes / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    typer.run(main)
