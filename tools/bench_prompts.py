"""What a prompt file with many copies costs: seconds to the first step, and memory.

    python tools/bench_prompts.py CONFIG.toml [--distinct 20000] [--copies 1 10 100] [section.key=value ...]

Writes files with the same distinct prompts, each as often as --copies says, as JSONL and as Parquet. In "jsonl, ids"
every row has another field of its own, so that no two lines are the same. For each file, a fresh process reads and
tokenises the prompts; then `megatron-tip train` takes one step with them. Prints a Markdown table: seconds until the
prompts are ready, the processor's part of that and the memory that it took at its peak; seconds from the command to the
end of the first step, and the peak memory of the first worker. --no-step leaves out the run.
"""

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from try_faults import Trial

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.observability.run_folder import RunFolder

KINDS = ("jsonl", "jsonl, ids", "parquet")
WORDS = ["let", "find", "number", "of", "all", "positive", "integers", "x^2 + y^2 = 1", "triangle ABC", "sqrt{5}"]


def texts_of(num_distinct: int) -> list[str]:
    draw = random.Random(1)
    return [f"Problem {place}: " + " ".join(draw.choices(WORDS, k=90)) for place in range(num_distinct)]


def row_of(text: str, index: int) -> dict[str, Any]:
    """Returns a row like those of DAPO's file."""
    messages = [{"role": "user", "content": text}]
    return {"data_source": "generated", "prompt": messages, "extra_info": {"index": f"{index:036}"}}


def write_file(path: Path, kind: str, num_distinct: int, copies: int) -> None:
    """Writes all distinct rows, then all of them again, and so on."""
    texts = texts_of(num_distinct)
    rows = [row_of(text, index) for index, text in enumerate(texts)]
    if kind == "parquet":
        table = pa.Table.from_pylist(rows)
        with pq.ParquetWriter(path, table.schema) as writer:
            for _ in range(copies):
                writer.write_table(table)
        return
    with path.open("w") as file:
        for copy in range(copies):
            if kind == "jsonl, ids":
                rows = [row_of(text, copy * num_distinct + index) for index, text in enumerate(texts)]
            file.writelines(json.dumps(row) + "\n" for row in rows)


def read(config: Config) -> tuple[float, float, float]:
    """Returns seconds, seconds of the processor and MB that the prompts took. Runs in a fresh process."""
    from transformers import AutoTokenizer

    from megatron_tip.prompts.source import load_prompts

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    before = peak_mb()
    start, processor = time.monotonic(), time.process_time()
    load_prompts(
        config.prompts,
        config.heldout,
        tokenizer,
        prompts_per_step=config.rollout.prompts_per_step,
        steps=1,
        seed=config.run.seed,
    )
    return time.monotonic() - start, time.process_time() - processor, peak_mb() - before


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def take_step(config_path: Path, settings: list[str], folder: Path) -> tuple[float, float]:
    """Returns the seconds from the command to the first step's metrics, and the peak MB of the first worker."""
    if folder.exists():  # the metrics of the file before it would count as this one's
        shutil.rmtree(folder)
    run = RunFolder(folder)
    trial = Trial(config_path, settings, run, 1, run)
    start = time.monotonic()
    process = trial.start("--fresh")
    trial.wait(process, lambda: trial.recorded() >= 1)
    seconds = time.monotonic() - start
    status = Path(f"/proc/{trial.workers(process)[0]}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    trial.kill_all(process)
    return seconds, peak / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config_path", type=Path, metavar="CONFIG.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--distinct", type=int, default=20_000)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_prompts"))
    parser.add_argument("--no-step", action="store_true")
    arguments = parser.parse_intermixed_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print("| File | Rows | Distinct | MB | Ready, s | Processor, s | Memory, MB | First step, s | First worker, MB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for kind in arguments.kinds:
        for copies in arguments.copies:
            path = arguments.folder / f"prompts.{kind.split(',')[0]}"
            write_file(path, kind, arguments.distinct, copies)
            settings = [*arguments.overrides, "prompts.source=file", f"prompts.path={path}", "prompts.tasks=[]"]
            settings += ["training.steps=2", "optimizer.warmup_steps=0", "heldout.num_prompts=0"]
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, processor, memory = pool.apply(read, (load_config(arguments.config_path, settings),))
            step, worker = float("nan"), float("nan")
            if not arguments.no_step:
                step, worker = take_step(arguments.config_path, settings, arguments.folder / "run")
            print(
                f"| {kind} | {arguments.distinct * copies:,} | {arguments.distinct:,} | "
                f"{path.stat().st_size / 1e6:,.0f} | {seconds:.1f} | {processor:.1f} | {memory:,.0f} | {step:.1f} | "
                f"{worker:,.0f} |",
                flush=True,
            )
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
