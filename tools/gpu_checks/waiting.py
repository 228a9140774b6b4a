"""A decode loop on a GPU where another process waits in a collective, as ranks do while the first one generates."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_tip.records import Prompt
from megatron_tip.rollout.embedded.engine import EmbeddedEngine
from megatron_tip.rollout.engine import SamplingParams
from tools.gpu_checks.ranks import run_ranks
from tools.gpu_checks.task import Task


def decode_beside(task: Task) -> None:
    """Notes tokens a second beside a rank that sleeps, one that waits in gloo's broadcast, and one in NCCL's."""
    ways = ("nobody", "gloo", *["nccl"] * task.on_gpu)
    tokens = task.size(256, 4)
    place = "tools.gpu_checks.waiting:rates"
    rates, _ = run_ranks(place, 2, task, task.device, str(task.folder), ways, tokens, seconds=task.size(80, 200))
    task.note(tokens_per_second={name: round(rate, 1) for name, rate in rates.items()})
    if not task.on_gpu:
        task.note(nccl="needs a GPU")


def rates(device: str, folder: str, ways: tuple[str, ...], tokens: int) -> dict[str, float]:
    """Returns rank 0's tokens a second beside rank 1 waiting in each of `ways`; nothing on rank 1."""
    rank = dist.get_rank()
    engine = _engine(device) if rank == 0 else None
    signals = {
        "gloo": torch.zeros(1),
        "nccl": torch.zeros(1, device=device),
    }
    for way in ways:  # connects, and compiles what is compiled once
        if way in signals:
            dist.broadcast(signals[way], src=0)
    if engine is not None:
        _decode(engine, tokens)
    found = {}
    for way in ways:
        dist.all_reduce(torch.zeros(1))  # between CPUs, everywhere
        done = Path(folder, f"{way}.done")
        if engine is None:
            _wait(way, signals, done)
            continue
        time.sleep(0.5)  # the other one is waiting by then
        start = time.monotonic()
        _decode(engine, tokens)
        found[way] = tokens / (time.monotonic() - start)
        done.touch()
        if way in signals:
            dist.broadcast(signals[way], src=0)
    return found


def _wait(way: str, signals: dict[str, torch.Tensor], done: Path) -> None:
    if way in signals:
        dist.broadcast(signals[way], src=0)
        signals[way].item()
    while not done.exists():
        time.sleep(0.05)


def _engine(device: str) -> EmbeddedEngine:
    """Returns an engine with random weights, small enough that launches set its pace, as in a decode loop."""
    config = Qwen3Config(
        num_hidden_layers=4,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1000,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    engine = EmbeddedEngine(config, dtype=torch.float32, device=device)
    engine.update_weights(weights.items(), 0)
    return engine


def _decode(engine: EmbeddedEngine, tokens: int) -> None:
    sampling = SamplingParams(tokens, 1.0, 1.0, 1, (), seed=0)
    (rollout,) = engine.generate([Prompt(0, "", (1, 2, 3))], sampling)
    assert len(rollout.response_ids) == tokens, "without a stop token a response has its full length"
