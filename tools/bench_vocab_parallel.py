"""The vocabulary-parallel loss and statistics, compared with the unavoidable matrix products, TRL and Liger.

    python tools/bench_vocab_parallel.py [--tp 2] [--divergence jsd] [--peer-python /path/to/python] [--json]

Every case computes one divergence of all rows, including both heads and the student's gradients, from the same inputs,
in its own processes. "rho" cases score all rows first and then compute the loss of that share of them. TRL and Liger
are called as their users call them, by an interpreter that has them, on one rank.

Seconds are the median of all calls after the first, on the slower rank. The cases take turns, `--rounds` times, so that
a drift in the machine's speed affects all of them equally. On a busy machine compare CPU seconds with `--threads 1`:
more threads spin while they wait for each other, and that is counted.

Memory is the largest peak of a rank's resident set above what was resident before the call, with all inputs loaded and
all free memory returned. Bytes are what a rank puts into collectives, per row. The error is the largest relative error,
in the Euclidean norm, of the value and of both gradients, compared with float64 arithmetic on the same inputs; for
scoring, the error of every row's divergence.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

CASES = Path(__file__).parent / "bench_vocab_parallel_cases.py"
FLOOR_CHUNKS = (128, 512, 1024)
RATIOS = (0.5, 0.1, 0.05)


@dataclass(frozen=True)
class Setting:
    """The inputs of every case, in the form that `make_work` takes."""

    rows: int
    hidden: int
    vocab: int
    tp: int
    threads: int
    dtype: str
    divergence: str
    calls: int
    reference: str


@dataclass(frozen=True)
class Case:
    """A row of the table: a function of the cases, its options, and the interpreter that runs it."""

    name: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    python: str = sys.executable


@dataclass(frozen=True)
class Measured:
    """One row's numbers. `peak_bytes` and `sent_bytes_per_row`: of the rank with the most."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    sent_bytes_per_row: float
    collectives: int
    errors: dict[str, float]


def main(
    rows: Annotated[int, typer.Option(min=1, help="Tokens.")] = 2048,
    hidden: Annotated[int, typer.Option(min=1, help="H of both models.")] = 576,
    vocab: Annotated[int, typer.Option(min=1, help="Vocabulary, a multiple of --tp.")] = 49_152,
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share the heads.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of all ranks together.")] = 2,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type of hidden states and heads.")] = "float32",
    divergence: Annotated[Literal["reverse_kl", "forward_kl", "jsd"], typer.Option()] = "reverse_kl",
    chunk_rows: Annotated[list[int] | None, typer.Option(help="Also test our loss in such chunks; repeatable.")] = None,
    block_kib: Annotated[list[int] | None, typer.Option(help="Also test our loss in such blocks; repeatable.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also test ours with torch.compile.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Number of processes per case.")] = 3,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls per process.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Run only cases whose name contains this; repeatable.")] = None,
    with_errors: Annotated[bool, typer.Option("--errors/--no-errors", help="Compare with float64.")] = True,
    peer_python: Annotated[Path, typer.Option(help="The interpreter that may have trl and liger_kernel.")] = Path(
        sys.executable
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure losses over a large vocabulary: seconds, memory, bytes sent, error."""
    cases, missing = our_cases(chunk_rows or [], block_kib or [], compiled), []
    if tp == 1:
        peers, missing = peer_cases(str(peer_python))
        cases += [*materialised_cases(), *peers]
    cases = [case for case in cases if any(part in case.name for part in only or [""])]
    with tempfile.TemporaryDirectory(prefix="bench_vocab_parallel_") as name:
        folder = Path(name)
        setting = Setting(
            rows, hidden, vocab, tp, threads // tp or 1, dtype, divergence, calls, str(folder / "reference.pt")
        )
        if with_errors:
            run(Case("reference", "reference"), replace(setting, tp=1, threads=threads), folder)
        measured = measure_cases(cases, setting, folder, rounds)
    if as_json:
        result = {"setting": asdict(setting), "cases": [asdict(row) for row in measured], "missing": missing}
        typer.echo(json.dumps(result, indent=2))
    else:
        Console(width=120).print(table_of(measured, missing, setting))


def our_cases(chunk_rows: Sequence[int], block_kib: Sequence[int], compiled: bool) -> list[Case]:
    cases = [Case(f"four products, {rows} rows", "products", {"chunk_rows": rows}) for rows in FLOOR_CHUNKS]
    cases.append(Case("our four products, 256 rows", "our_products", {"chunk_rows": 256}))
    cases.append(Case("ours, loss of all rows", "ours_loss"))
    cases.append(Case("ours, scoring", "ours_scoring"))
    cases += [Case(f"ours, scoring and loss, rho {ratio}", "ours_selected", {"ratio": ratio}) for ratio in RATIOS]
    cases += [Case(f"ours, loss, chunks of {rows} rows", "ours_loss", {"chunk_rows": rows}) for rows in chunk_rows]
    cases += [Case(f"ours, loss, blocks of {kib} KiB", "ours_loss", {"block_kib": kib}) for kib in block_kib]
    if compiled:
        names = ("ours, loss of all rows", "ours, scoring", "ours, scoring and loss, rho 0.1")
        again = [case for case in cases if case.name in names]
        by_compiler = {"kernels": "compiled"}
        cases += [Case(f"{case.name}, compiled", case.function, case.options | by_compiler) for case in again]
    return cases


def materialised_cases() -> list[Case]:
    return [
        Case("log_softmax and kl_div, all logits", "plain"),
        Case("the same, checkpointed, 128 rows", "checkpointed", {"chunk_rows": 128}),
        Case("the same, checkpointed, 1024 rows", "checkpointed", {"chunk_rows": 1024}),
    ]


def peer_cases(python: str) -> tuple[list[Case], list[str]]:
    """Returns the cases for which `python` has the packages, and the names of the packages that it lacks."""
    cases: list[Case] = []
    missing = []
    trl, liger = version_of("trl", python), version_of("liger-kernel", python)
    if trl:
        cases.append(Case(f"TRL {trl}, generalised JSD of logits", "trl_jsd", {}, python))
        cases.append(Case(f"TRL {trl}, chunked divergence", "trl_chunked", {}, python))
    else:
        missing.append(f"TRL: not installed for {python}")
    if liger:
        cases += [Case(f"Liger {liger}, {rows} rows", "liger", {"chunk_rows": rows}, python) for rows in (128, 1024)]
        # Each call creates a new compiled function; torch.compile recompiles it until it recognises it.
        options = {"chunk_rows": 1024, "compiled": True, "warm_up_calls": 3}
        cases.append(Case(f"Liger {liger}, 1024 rows, compiled", "liger", options, python))
    else:
        missing.append(f"Liger: not installed for {python}")
    return cases, missing


def version_of(package: str, python: str) -> str | None:
    probe = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def measure_cases(cases: Sequence[Case], setting: Setting, folder: Path, rounds: int) -> list[Measured]:
    """Runs all cases in turn, `rounds` times, and returns their rows."""
    progress = Console(stderr=True)
    results: dict[str, list[list[dict[str, Any]]]] = {case.name: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            ranks = list(run(case, setting, folder))
            seconds = ", ".join(f"{second:.2f}" for rank in ranks for second in rank["seconds"])
            progress.print(f"round {number + 1} of {rounds}: {case.name}: {seconds}")
            results[case.name].append(ranks)
    return [measured(name, ranks_by_round, setting.rows) for name, ranks_by_round in results.items()]


def run(case: Case, setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """Runs a case once and returns each rank's result; nothing for the reference, which writes a file."""
    place = Path(tempfile.mkdtemp(dir=folder))
    task = place / "task.json"
    task.write_text(json.dumps({**asdict(setting), "case": case.function, "options": case.options}))
    results = [place / f"{rank}.json" for rank in range(setting.tp)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [case.python, str(CASES), str(task), str(rank), str(result)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    outputs = [process.communicate()[1] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            sys.exit(f"error: {case.name} ended with {process.returncode}:\n{output[-4000:]}")
    return (json.loads(result.read_text()) for result in results if result.exists())


def measured(name: str, ranks_by_round: Sequence[Sequence[dict[str, Any]]], rows: int) -> Measured:
    """Returns a row from the results of every round and rank."""
    everything = [result for ranks in ranks_by_round for result in ranks]

    def slowest(key: str) -> float:
        calls = [call for ranks in ranks_by_round for call in zip(*(result[key] for result in ranks), strict=True)]
        return statistics.median(max(call) for call in calls)

    errors = [result["errors"] for result in everything if "errors" in result]
    return Measured(
        name=name,
        seconds=slowest("seconds"),
        cpu_seconds=slowest("cpu_seconds"),
        peak_bytes=max(result["peak_bytes"] for result in everything),
        sent_bytes_per_row=max(result["sent_bytes"] for result in everything) / rows,
        collectives=everything[0]["collectives"],
        errors={key: max(error[key] for error in errors) for key in (errors[0] if errors else ())},
    )


def table_of(measured: Sequence[Measured], missing: Sequence[str], setting: Setting) -> Table:
    """Returns the table of all rows. The floor is the fastest of the bare products with torch's matrix product."""
    title = (
        f"{setting.divergence}, {setting.rows} rows, H {setting.hidden}, V {setting.vocab}, {setting.dtype}, "
        f"tp {setting.tp}, {setting.threads} threads per rank"
    )
    table = Table(title=title)
    table.add_column("")
    for heading in ("seconds", "x floor", "CPU s", "x floor", "peak MB", "bytes sent per row", "error"):
        table.add_column(heading, justify="right")
    products = [row for row in measured if row.name.startswith("four products")]
    floor = min((row.seconds for row in products), default=float("nan"))
    cpu_floor = min((row.cpu_seconds for row in products), default=float("nan"))
    for row in measured:
        table.add_row(
            row.name,
            f"{row.seconds:.2f}",
            f"{row.seconds / floor:.2f}",
            f"{row.cpu_seconds:.2f}",
            f"{row.cpu_seconds / cpu_floor:.2f}",
            f"{row.peak_bytes / 1e6:.0f}",
            f"{row.sent_bytes_per_row:.0f}" if row.collectives else "",
            f"{max(row.errors.values()):.1e}" if row.errors else "",
        )
    for name in missing:
        table.add_row(name)
    return table


if __name__ == "__main__":
    typer.run(main)
