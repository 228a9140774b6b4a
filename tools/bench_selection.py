"""Time and bytes of the selection over simulated data-parallel replicas, on this machine's CPU.

    python tools/bench_selection.py                      # every table
    python tools/bench_selection.py --only pruned_pair   # share of the pruned pair's step, what its budget saves

Each replica is a thread with its own shard. "local" is the processor time that one replica spends on its own shard
(median over replicas, best of the repeats), without the exchange. Threads that share a core disturb each other's
caches, so these are upper bounds.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from simulated_replicas import SimulatedReplica, run_simulated

from megatron_tip.observability.metrics_file import read_metrics
from megatron_tip.records import TokenIndex
from megatron_tip.selection import Selector
from megatron_tip.selection.budget import BatchBudget, TieOrder
from megatron_tip.selection.order_statistics import quantiles
from megatron_tip.statistics import TokenStatistics

RATIO = 0.05
PRUNED_PAIR = Path("examples/pruned_pair/pruned_pair.toml")
Part = Literal["growth", "selection", "pruned_pair"]


@dataclass(frozen=True)
class Cost:
    """The cost of one replica: processor milliseconds, bytes that it sends, and the number of its collectives."""

    local_ms: float
    sent_bytes: int
    collectives: int

    def row(self) -> str:
        return f"{self.local_ms:9.2f} {self.sent_bytes / 1024:9.1f} {self.collectives:4d}"


def measure(work: Callable[[SimulatedReplica], object], num_replicas: int, repeats: int) -> Cost:
    """Returns the cost of `work` for a replica: the median replica of the best repeat."""

    def timed(replica: SimulatedReplica) -> tuple[float, int, int]:
        start = time.thread_time()
        work(replica)
        local = time.thread_time() - start - sum(replica.collective_seconds)
        return local, sum(replica.sent_bytes), len(replica.sent_bytes)

    runs = [run_simulated(timed, num_replicas) for _ in range(repeats)]
    local = min(statistics.median(replica[0] for replica in run) for run in runs)
    return Cost(local * 1e3, runs[0][0][1], runs[0][0][2])


def bench_order_statistics(num_tokens: int, num_shards: int, repeats: int) -> None:
    """Prints one row: a pass over the shard, one quantile, one threshold with and without ties."""
    scores = torch.rand(num_tokens, generator=torch.Generator().manual_seed(0)) ** 4
    coarse = (scores * 16).floor() / 16
    shards, coarse_shards = scores.tensor_split(num_shards), coarse.tensor_split(num_shards)
    orders = torch.arange(num_tokens).tensor_split(num_shards)
    num_kept = max(1, int(num_tokens * RATIO))

    def one_pass(replica: SimulatedReplica) -> None:
        shards[replica.rank].max()

    def quantile(replica: SimulatedReplica) -> None:
        quantiles({"score": shards[replica.rank]}, [("score", 0.95)], num_tokens, replica)

    def threshold_of(parts: tuple[torch.Tensor, ...], replica: SimulatedReplica) -> None:
        ties = TieOrder(orders[replica.rank], num_tokens.bit_length())
        BatchBudget(num_kept, num_tokens, replica).keep([parts[replica.rank]], ties, with_runner_up=False)

    costs = [
        measure(one_pass, num_shards, repeats),
        measure(quantile, num_shards, repeats),
        measure(lambda replica: threshold_of(shards, replica), num_shards, repeats),
        measure(lambda replica: threshold_of(coarse_shards, replica), num_shards, repeats),
    ]
    print(f"{num_tokens:10d} {num_shards:6d} {costs[0].local_ms:8.2f} |" + " |".join(cost.row() for cost in costs[1:]))


def make_batch(num_rollouts: int, num_positions: int) -> tuple[TokenStatistics, TokenIndex]:
    generator = torch.Generator().manual_seed(0)
    num_rows = num_rollouts * num_positions

    def draw() -> torch.Tensor:
        return torch.rand(num_rows, generator=generator) ** 4

    fields = ("student_entropy", "teacher_entropy", "reverse_kl", "forward_kl", "support_divergence", "compatibility")
    rest = ("compatibility_lower_bound", "support_overlap", "support_jaccard", "shared_teacher_mass")
    statistics_ = TokenStatistics(**{name: draw() for name in (*fields, *rest, "student_mass_on_teacher_support")})
    rollouts = torch.arange(num_rollouts).repeat_interleave(num_positions)
    return statistics_, TokenIndex(rollouts, torch.arange(num_positions).repeat(num_rollouts))


def bench_selector(num_rollouts: int, num_positions: int, rule: str, compare: bool, repeats: int) -> None:
    """Prints one row: the whole selection of one replica's batch, metrics included."""
    batch = make_batch(num_rollouts, num_positions)
    selector = Selector(rule=rule, retention_ratio=RATIO, compare=compare)
    cost = measure(lambda replica: selector.select_among(replica, *batch, step=0), 1, repeats)
    print(f"{num_rollouts * num_positions:10d} {rule:28s} {'yes' if compare else 'no':>8s} {cost.row()}")


def main(
    only: Annotated[Part | None, typer.Option(help="Print only this part.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of repeats; the best one counts.")] = 3,
    config: Annotated[Path, typer.Option(help="Configuration of the run in the last table.")] = PRUNED_PAIR,
    steps: Annotated[int, typer.Option(min=3, help="Optimizer steps of that run; the first is not timed.")] = 5,
    rollouts: Annotated[Path | None, typer.Option(help="Rollouts of that run. Default: generate them first.")] = None,
) -> None:
    """Measure time and bytes of the selection, and what its budget saves."""
    torch.set_num_threads(1)
    tables = {
        "growth": lambda: print_growth(repeats),
        "selection": lambda: print_selection(repeats),
        "pruned_pair": lambda: print_pruned_pair(config, steps, rollouts),
    }
    for name in [only] if only else tables:
        tables[name]()


def print_growth(repeats: int) -> None:
    """Prints order statistics over simulated replicas: more tokens, then more replicas."""
    print("One replica's cost: local ms, KiB sent, collectives. A gather would send 4 bytes per token instead.\n")
    titles = " |".join(f"{title:>24s}" for title in ("0.95 quantile", "top 5 %", "top 5 %, many ties"))
    print(f"{'tokens':>10s} {'shards':>6s} {'1 pass':>8s} |{titles}")
    by_tokens = [(size, 64) for size in (10**4, 10**5, 10**6, 10**7)]
    by_shards = [(8 * 10**6, count) for count in (1, 8, 64, 512)]
    for num_tokens, num_shards in by_tokens + by_shards:
        bench_order_statistics(num_tokens, num_shards, repeats)


def print_selection(repeats: int) -> None:
    """Prints the whole selection of one replica, with and without the comparison of all rules."""
    print(f"\nThe whole selection of one replica's rows, rho = {RATIO}, with every metric.\n")
    print(f"{'tokens':>10s} {'rule':28s} {'compare':>8s} {'local ms':>9s} {'KiB':>9s} {'n':>4s}")
    for num_rollouts, num_positions in ((8, 64), (64, 128), (64, 2048)):
        for rule in ("random", "ta_opd_teachability", "tip_soft_or"):
            for compare in (False, True):
                bench_selector(num_rollouts, num_positions, rule, compare, repeats)


def print_pruned_pair(config: Path, steps: int, rollouts: Path | None) -> None:
    """Prints runs on the same rollouts at rho = 1, and at rho = 0.05 in two forward passes and in one.

    A step here is all its phases except the rollout, so the share of the selection is an upper bound.
    """
    print(f"\n{config.stem}: seconds per step by phase, medians of steps 2 to {steps}; tokens of the training pass.\n")
    columns = ("score", "select", "train", "sum", "select/step", "mbatches", "tokens", "saved", "s saved*")
    print(f"{'':34s}" + " ".join(f"{name:>11s}" for name in columns))
    at = f"selection.retention_ratio={RATIO}"
    with tempfile.TemporaryDirectory(prefix="bench_selection_") as name:
        folder = Path(name)
        replay = ["rollout.engine=replay", f"rollout.replay_folder={rollouts or folder / '0/rollouts'}"]
        variants = {
            f"rho = {RATIO}, two passes": [at, "selection.passes=two", *(replay if rollouts else [])],
            "rho = 1": ["selection.retention_ratio=1.0", *replay],
            f"rho = {RATIO}, one pass": [at, "selection.passes=one", *replay],
        }
        for number, (title, selection) in enumerate(variants.items()):
            common = [f"run.folder={folder / str(number)}", f"training.steps={steps}", "heldout.num_prompts=0"]
            common += ["optimizer.warmup_steps=1", "output.save_checkpoint=false", "output.export_hf=false"]
            command = [sys.executable, "-m", "megatron_tip.cli", "train", str(config), *common, *selection]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
            lines = [line for line in read_metrics(folder / str(number) / "metrics.jsonl") if line["step"] > 1]
            print(f"{title:34s}" + " ".join(f"{cell:>11s}" for cell in described_run(lines)), flush=True)
    print("\n* the run's own estimate, from tokens, with padding; the train columns show the measured saving")


def described_run(lines: list[dict[str, float]]) -> list[str]:
    """Returns the cells of one row."""

    def median(name: str) -> float:
        return statistics.median(line.get(name, 0.0) for line in lines)

    score, select, train = (median(f"time/{phase}_seconds") for phase in ("score", "select", "train"))
    step = median("time/teacher_seconds") + score + select + train + median("time/sync_seconds")
    tokens, uncut = (sum(line[f"train/num_model_tokens{end}"] for line in lines) for end in ("", "_uncut"))
    return [
        *(f"{seconds:.3f}" for seconds in (score, select, train, score + select + train)),
        f"{select / step:.2%}",
        f"{sum(line['train/num_micro_batches'] for line in lines):.0f}",
        f"{tokens:.0f}",
        f"{1 - tokens / uncut:.1%}",
        f"{median('perf/saved_train_seconds'):.3f}",
    ]


if __name__ == "__main__":
    typer.run(main)
