"""The measured peak memory of a rank's training pass, with its sequences in parts (context parallelism) and whole.

    python tools/bench_context_parallel.py [--tokens 4096] [--layers 8] [--hidden-size 768] [--sizes 1,2]

A response of that many tokens, a random Qwen3 in float32 with three query heads per key/value head and Megatron's local
layers, a small teacher, and one process with one thread per rank over gloo. The pass is a step's: forward, loss on
every token, backward, after an identical one that fills the gradients and all caches. The peak is that of the resident
set above what the process held before the pass, on the rank that has the most.
"""

import ctypes
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' tiny models

from megatron_tip.config import Config
from megatron_tip.records import Rollout
from tests.helpers.distributed import run_workers
from tests.helpers.tiny import make_qwen
from tests.helpers.training import Layout, build_tiny_run, make_config, make_rollouts
from tools.meter import Reading, read_call

TIMEOUT_SECONDS = 3600.0
M_MMAP_THRESHOLD = -3
"""Of malloc.h: from this size on, each tensor has pages of its own, which go back to the system with it."""


@dataclass(frozen=True)
class Shape:
    """What is measured: a student of `num_layers` of width `hidden_size`, and a response of `num_tokens`."""

    num_tokens: int
    num_layers: int
    hidden_size: int

    def write_models(self, folder: Path) -> None:
        """Writes the student, and a teacher whose rows take little memory."""
        sizes = {
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": 3 * self.hidden_size,
            "head_dim": self.hidden_size // 12,
            "max_position_embeddings": 2 * self.num_tokens,
        }
        make_qwen(folder / "student", qk_norm=True, seed=1, **sizes)
        make_qwen(folder / "teacher", qk_norm=True, seed=2, max_position_embeddings=2 * self.num_tokens)

    def config(self, models: Path, cp_size: int) -> Config:
        """Returns the run's configuration: both models in the same parts, every token trained on."""
        return make_config(
            models,
            Layout(cp_size, cp=(cp_size, cp_size)),
            rollout={"max_response_tokens": self.num_tokens},
            selection={"rule": "full", "retention_ratio": 1.0},
            training={"max_tokens_per_micro_batch": self.num_tokens},
        )


def training_pass(config: Config, rollouts: list[Rollout]) -> Reading:
    """Returns the figures of this rank's second training pass. Runs in a worker."""
    from megatron_tip.training.step import score, select_then_train

    # Otherwise freed tensors of up to 32 MB stay in the allocator's heap, and its holes count as memory in use.
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
    run = build_tiny_run(config, rollouts)
    batch = run.batch_of(rollouts)
    scored = score(run, batch, run.teacher.ask(batch), 1)
    select_then_train(run, scored, 1)
    return read_call(lambda: select_then_train(run, scored, 1), torch.device("cpu"))[0]


def most_demanding(shape: Shape, cp_size: int, models: Path, scratch: Path) -> Reading:
    """Returns the figures of the rank with the highest peak."""
    rollouts = make_rollouts([shape.num_tokens])
    config = shape.config(models, cp_size)
    ranks = run_workers(training_pass, cp_size, scratch, config, rollouts, timeout_seconds=TIMEOUT_SECONDS)
    return max(ranks, key=lambda reading: reading.peak_bytes)


def measure(shape: Shape, cp_sizes: Sequence[int], folder: Path) -> list[Reading]:
    """Prints a row for each size, and returns the figures."""
    shape.write_models(folder)
    found: list[Reading] = []
    typer.echo("| Context-parallel ranks | Peak of a rank, MB | Of the first row | Seconds |\n|---|---|---|---|")
    for cp_size in cp_sizes:
        found.append(most_demanding(shape, cp_size, folder, folder))
        peak, share = found[-1].peak_bytes, found[-1].peak_bytes / found[0].peak_bytes
        typer.echo(f"| {cp_size} | {peak / 1e6:.1f} | {share:.3f} | {found[-1].seconds:.1f} |")
    return found


def main(
    tokens: Annotated[int, typer.Option(min=1, help="Of the response.")] = 4096,
    layers: Annotated[int, typer.Option(min=1, help="Of the student.")] = 8,
    hidden_size: Annotated[int, typer.Option(min=24, help="Of the student; a multiple of 24.")] = 768,
    sizes: Annotated[str, typer.Option(help="Context-parallel sizes, each a number of processes.")] = "1,2",
) -> None:
    """Measure the peak memory of a rank's training pass under context parallelism."""
    shape = Shape(tokens, layers, hidden_size)
    with tempfile.TemporaryDirectory(prefix="bench_context_parallel_") as folder:
        measure(shape, [int(size) for size in sizes.split(",")], Path(folder))


if __name__ == "__main__":
    typer.run(main)
