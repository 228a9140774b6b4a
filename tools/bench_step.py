"""One training step compared with TRL's DistillationTrainer on the same work: seconds, phases, memory, and the result.

    python tools/bench_step.py [--steps 10] [--trl-python /path/to/python] [--json]
    python tools/bench_step.py --growth [--steps 4]

The work: a teacher, and the same model without some of its layers as student; reasoning-gym's basic_arithmetic, 8
prompts x 64 new tokens per step; reverse KL over the full vocabulary on every token; float32, except in the rows named
bfloat16 (rollouts and teacher alone, or also the student's weights and activations); AdamW at a constant rate, with the
same settings. Rows named SGLang generate on a server that the run starts; with "one step ahead", generation during
training is not part of any phase. Each row is printed to standard error when it ends. All rows get the same prompts in
the same order. The rows named "one token in ten" choose the tokens by teachability, in one forward pass of the student
or in two (selection.passes): one scores with gradient and its training is the backward pass alone, two trains on
sequences cut after their last selected token.

Each row is a run in its own processes; rows run one after the other. Seconds per step are the median over the steps
after the first. Memory is the peak of the resident sets of all processes of a run together, including its launcher;
pages that processes share are counted in each. tools/heldout_reverse_kl.py measures the held-out reverse KL of the
saved student.

With --growth it prints another table instead: the seconds of the models' phases in steps of 512 to 4,096 response
tokens on one replica, which ought to grow in proportion to the tokens. All rows take two passes in micro-batches of at
most 2,048 tokens, prompts included.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import psutil
import tomli_w
import typer
from rich.console import Console
from rich.table import Table

TOOLS = Path(__file__).parent
TASK = "basic_arithmetic"
WIDTH = 150
PHASES = ("rollout", "teacher", "score", "select", "train", "sync")
MODEL_PHASES = ("teacher", "score", "train")
"""The phases whose work is proportional to the tokens that go through the models."""
GROWTH = (512, 1024, 2048, 4096)
"""Response tokens of a step, on one replica, in the rows of --growth."""
OPTIMIZER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.0, "clip_grad": 1.0}


@dataclass(frozen=True)
class Work:
    """The work of all rows. `prompts`, `heldout`: JSONL files of questions; `student`: the pruned model's folder."""

    teacher: Path
    student: Path
    prompts: Path
    heldout: Path
    steps: int
    prompts_per_step: int
    response_tokens: int
    threads: int
    seed: int

    def environment(self) -> dict[str, str]:
        """Returns the environment of a process that uses all threads and no network."""
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Variant:
    """One of our own rows: the layout of both models, which tokens are supervised, the types, and the engine."""

    name: str
    tp: int
    dp: int
    rule: str = "full"
    retention_ratio: float = 1.0
    passes: str = "auto"
    rollout_dtype: str = "float32"
    teacher_dtype: str = "float32"
    model_dtype: str = "float32"
    engine: str = "embedded"
    ahead: int = 0
    micro_batch_tokens: int = 16384


ALL_TOKENS = (Variant("tp 1", tp=1, dp=1), Variant("dp 2", tp=1, dp=2), Variant("tp 3", tp=3, dp=1))
ONE_IN_TEN = [
    replace(
        variant,
        name=f"{variant.name}, one token in ten, {in_words}",
        rule="ta_opd_teachability",
        retention_ratio=0.1,
        passes=passes,
    )
    for variant in ALL_TOKENS
    for passes, in_words in (("two", "two passes"), ("one", "one pass"))
]

IN_BFLOAT16 = Variant(
    "tp 1, bfloat16", 1, 1, rollout_dtype="bfloat16", teacher_dtype="bfloat16", model_dtype="bfloat16"
)
BFLOAT16 = (
    replace(IN_BFLOAT16, name="tp 1, bfloat16 rollouts and teacher", model_dtype="float32"),
    IN_BFLOAT16,
    replace(IN_BFLOAT16, name="dp 2, bfloat16", dp=2),
    replace(IN_BFLOAT16, name="tp 1, bfloat16, SGLang", engine="sglang"),
    replace(IN_BFLOAT16, name="tp 1, bfloat16, SGLang one step ahead", engine="sglang", ahead=1),
)


@dataclass(frozen=True)
class Measured:
    """One row's numbers. `seconds`: per step, by phase and in total ("step"). `model_tokens`: of a step, prompts
    included; 0 if not counted.
    """

    name: str
    seconds: dict[str, float]
    model_tokens: float
    response_tokens_per_second: float
    peak_rss_bytes: int
    heldout_reverse_kl: dict[str, float]


def main(
    model: Annotated[Path, typer.Option(help="The teacher, a Hugging Face directory.")] = Path(
        ".cache/quickstart/SmolLM2-135M-Instruct"
    ),
    drop_layers: Annotated[str, typer.Option(help="Layers to remove for the student.")] = "20,21,22,23,24,25",
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps; the first is not timed.")] = 10,
    prompts_per_step: Annotated[int, typer.Option(min=1, help="Prompts per step.")] = 8,
    response_tokens: Annotated[int, typer.Option(min=1, help="Maximum of new tokens per response.")] = 64,
    heldout_prompts: Annotated[int, typer.Option(min=1, help="Prompts that the students are compared on.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of all processes of a row together.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Run only rows whose name contains this; repeatable.")] = None,
    trl_python: Annotated[Path, typer.Option(help="The interpreter that may have trl.")] = Path(sys.executable),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    growth: Annotated[bool, typer.Option(help="How the seconds grow with the tokens of a step.")] = False,
) -> None:
    """Compare one training step with TRL's DistillationTrainer on the same work."""
    with tempfile.TemporaryDirectory(prefix="bench_step_") as name:
        folder = Path(name)
        work = Work(
            teacher=model.resolve(),
            student=folder / "student",
            prompts=folder / "prompts.jsonl",
            heldout=folder / "heldout.jsonl",
            steps=steps,
            prompts_per_step=prompts_per_step,
            response_tokens=response_tokens,
            threads=threads,
            seed=seed,
        )
        if growth:
            work = replace(work, prompts_per_step=max(GROWTH) // response_tokens)
        write_questions(work, heldout_prompts)
        write_student(work, [int(layer) for layer in drop_layers.split(",")])
        if growth:
            table = growth_table_of(rows := measure_growth(work, folder))
        else:
            table = table_of(rows := measure_rows(work, folder, trl_python, only or [""]))
    typer.echo(json.dumps(described(rows), indent=2)) if as_json else Console(width=WIDTH).print(table)


def write_questions(work: Work, heldout_prompts: int) -> None:
    """Writes different questions; the first ones are for training."""
    from megatron_tip.prompts.reasoning_tasks import generate_questions

    num_training = work.steps * work.prompts_per_step
    wanted = num_training + heldout_prompts
    questions = list(dict.fromkeys(one.text for one in generate_questions([TASK], 2 * wanted, work.seed)))[:wanted]
    assert len(questions) == wanted, f"{TASK}: expected {wanted} different questions, got {len(questions)}"
    for path, part in ((work.prompts, questions[:num_training]), (work.heldout, questions[num_training:])):
        path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in part))


def write_student(work: Work, drop_layers: Sequence[int]) -> None:
    """Writes the teacher without some of its layers as a Hugging Face directory."""
    from megatron_tip.conversion.safetensors_io import HfCheckpoint, write_safetensors
    from megatron_tip.conversion.weight_map import hf_shapes

    pruned = HfCheckpoint(work.teacher, drop_layers)
    shapes = hf_shapes(pruned.architecture)
    work.student.mkdir()
    pruned.write_description(work.student, pruned.dtype)
    write_safetensors(work.student, ((name, pruned.read(name)) for name in shapes), shapes, pruned.dtype)


def measure_rows(work: Work, folder: Path, trl_python: Path, wanted: Sequence[str]) -> list[Measured | str]:
    """Returns the wanted rows; a row is a text if TRL or SGLang is not installed."""
    progress = Console(stderr=True, width=WIDTH)
    before = heldout_reverse_kl(work, work.student)
    rows: list[Measured | str] = []
    for variant in (*ALL_TOKENS, *ONE_IN_TEN, *BFLOAT16):
        name = f"megatron_tip, {variant.name}"
        if any(part in name for part in wanted):
            if variant.engine == "sglang" and find_spec("sglang") is None:
                rows.append(f"{name}: not installed; run `make sglang-cpu`")
                continue
            progress.print(name)
            rows.append(run_ours(work, folder / f"row{len(rows)}", name, variant, before))
            progress.print(table_of(rows[-1:]))
    version = trl_version(trl_python)
    name = f"TRL {version}" if version else f"TRL: not installed for {trl_python}"
    if any(part in name for part in wanted):
        progress.print(name)
        rows.append(run_trl(work, folder / f"row{len(rows)}", name, trl_python, before) if version else name)
    return rows


def measure_growth(work: Work, folder: Path) -> list[Measured]:
    """Returns a row for each number of response tokens of a step in GROWTH: all tokens of all layers, one process."""
    # In two passes and in micro-batches of one size: with "auto" the free memory would decide, and it would not last.
    variant = replace(
        ALL_TOKENS[0], rule="ta_opd_teachability", retention_ratio=0.99, passes="two", micro_batch_tokens=2048
    )
    rows: list[Measured] = []
    for tokens in GROWTH:
        smaller = replace(work, prompts_per_step=tokens // work.response_tokens)
        rows.append(run_ours(smaller, folder / f"row{len(rows)}", f"{tokens} response tokens", variant))
    return rows


def run_ours(work: Work, folder: Path, name: str, variant: Variant, before: float | None = None) -> Measured:
    """Does one run of `megatron-tip train` and returns its numbers.

    `before`: the held-out reverse KL of the student; None: it is not measured after the run either.
    """
    folder.mkdir()
    config = folder / "run.toml"
    config.write_text(tomli_w.dumps(config_of(work, folder / "run", variant)))
    command = [sys.executable, "-m", "megatron_tip.cli", "train", str(config), "--nproc", str(variant.tp * variant.dp)]
    peak = run(command, dict(os.environ), folder / "log")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [{phase: line[f"time/{phase}_seconds"] for phase in PHASES} for line in lines if line["step"] > 0]
    tokens = [line["rollout/response_tokens"] for line in lines if line["step"] > 0]
    model_tokens = [line["train/num_model_tokens"] for line in lines if line["step"] > 0]
    heldout = {} if before is None else {"before": before, "after": heldout_reverse_kl(work, folder / "run/hf")}
    row = measured(name, steps, [sum(seconds.values()) for seconds in steps], tokens, peak, heldout)
    return replace(row, model_tokens=statistics.median(model_tokens[1:]))


def config_of(work: Work, folder: Path, variant: Variant) -> dict[str, Any]:
    """Returns the run's configuration as the content of a TOML file."""
    return {
        "run": {"folder": str(folder), "seed": work.seed, "threads": work.threads},
        "model": {"path": str(work.student), "dtype": variant.model_dtype, "tensor_parallel_size": variant.tp},
        "teacher": {"path": str(work.teacher), "dtype": variant.teacher_dtype, "tensor_parallel_size": variant.tp},
        "prompts": {"path": str(work.prompts), "shuffle": False},
        "heldout": {"num_prompts": 0},
        "rollout": {
            "prompts_per_step": work.prompts_per_step,
            "max_response_tokens": work.response_tokens,
            "dtype": variant.rollout_dtype,
            "engine": variant.engine,
            "ahead": variant.ahead,
        },
        "sglang": {"threads": work.threads},
        "selection": {
            "rule": variant.rule,
            "retention_ratio": variant.retention_ratio,
            "passes": variant.passes,
        },
        "loss": {"divergence": "reverse_kl"},
        "optimizer": {**OPTIMIZER, "min_lr": OPTIMIZER["lr"]},
        "training": {"steps": work.steps, "max_tokens_per_micro_batch": variant.micro_batch_tokens},
        "output": {"save_checkpoint": False, "save_rollouts": False},
    }


def run_trl(work: Work, folder: Path, name: str, python: Path, before: float) -> Measured:
    """Does one run of TRL's trainer in its own interpreter and returns its numbers."""
    folder.mkdir()
    task, result = folder / "task.json", folder / "result.json"
    paths = {"teacher": work.teacher, "student": work.student, "prompts": work.prompts, "output": folder / "hf"}
    numbers = ("steps", "prompts_per_step", "response_tokens", "seed")
    content = {key: str(path) for key, path in paths.items()} | {key: getattr(work, key) for key in numbers}
    task.write_text(json.dumps({**content, "optimizer": OPTIMIZER}))
    command = [str(python), str(TOOLS / "bench_step_trl.py"), str(task), str(result)]
    peak = run(command, work.environment(), folder / "log")
    steps = json.loads(result.read_text())
    after = heldout_reverse_kl(work, folder / "hf")
    return measured(
        name,
        [step["phases"] for step in steps],
        [step["seconds"] for step in steps],
        [step["response_tokens"] for step in steps],
        peak,
        {"before": before, "after": after},
    )


def trl_version(python: Path) -> str | None:
    """Returns the version of TRL if `python` can import its DistillationTrainer, else None."""
    probe = "import trl; from trl import DistillationTrainer; print(trl.__version__)"
    done = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, check=False)
    return done.stdout.split()[-1] if done.returncode == 0 else None


def heldout_reverse_kl(work: Work, student: Path) -> float:
    """Returns the reverse KL of a saved student on its own responses to the held-out prompts."""
    command = [sys.executable, str(TOOLS / "heldout_reverse_kl.py"), str(student), str(work.teacher), str(work.heldout)]
    options = ["--response-tokens", str(work.response_tokens), "--seed", str(work.seed)]
    done = subprocess.run([*command, *options], env=work.environment(), stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Runs `command` to its end; returns the largest sum of its processes' resident sets, in bytes."""
    peak = 0
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                peak = max(peak, resident_bytes(process.pid))
                time.sleep(0.1)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    return peak


def resident_bytes(pid: int) -> int:
    """Returns the resident bytes of a process and all its descendants together."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def measured(
    name: str,
    phases: Sequence[Mapping[str, float]],
    totals: Sequence[float],
    tokens: Sequence[float],
    peak_rss_bytes: int,
    heldout: dict[str, float],
) -> Measured:
    """Returns a row from its steps; the first step is left out of all times."""
    seconds = {phase: statistics.median(step[phase] for step in phases[1:]) for phase in phases[0]}
    return Measured(
        name=name,
        seconds={"step": statistics.median(totals[1:]), **seconds},
        model_tokens=0.0,
        response_tokens_per_second=sum(tokens[1:]) / sum(totals[1:]),
        peak_rss_bytes=peak_rss_bytes,
        heldout_reverse_kl=heldout,
    )


def described(rows: Sequence[Measured | str]) -> list[dict[str, Any]]:
    return [asdict(row) if isinstance(row, Measured) else {"name": row} for row in rows]


def table_of(rows: Sequence[Measured | str]) -> Table:
    table = Table(title="Seconds per step (median), response tokens per second, peak memory, held-out reverse KL")
    table.add_column("")
    for title in ("step", *PHASES, "tokens/s", "GB", "KL before", "after"):
        table.add_column(title, justify="right")
    for row in rows:
        if isinstance(row, str):
            table.add_row(row)
            continue
        seconds = [f"{row.seconds[key]:.2f}" if key in row.seconds else "" for key in ("step", *PHASES)]
        heldout = [f"{row.heldout_reverse_kl[key]:.2f}" for key in ("before", "after")]
        rest = [f"{row.response_tokens_per_second:.1f}", f"{row.peak_rss_bytes / 1e9:.2f}", *heldout]
        table.add_row(row.name, *seconds, *rest)
    return table


def growth_table_of(rows: Sequence[Measured]) -> Table:
    table = Table(title="Seconds per step (median) and per 1,000 tokens that go through the models")
    table.add_column("")
    for title in ("tokens", *MODEL_PHASES, "together", "per 1,000 tokens"):
        table.add_column(title, justify="right")
    for row in rows:
        seconds = [row.seconds[phase] for phase in MODEL_PHASES]
        values = (*seconds, sum(seconds), 1000 * sum(seconds) / row.model_tokens)
        table.add_row(row.name, f"{row.model_tokens:.0f}", *(f"{value:.2f}" for value in values))
    return table


if __name__ == "__main__":
    typer.run(main)
