"""Gives spoiled inputs to the commands that read them, and judges how each ends.

    python tools/fuzz_inputs.py [--seed 0] [--cases 500] [--only N] [--out FOLDER] [--seconds 60]

A case spoils one or two good inputs of one kind (configuration, command line, model, Megatron checkpoint, prompts, run
folder, bank) and runs one command on them in a forked process with limits on time and memory. It must end with success,
or with exactly one message and no traceback, and leave nothing half-written. --seed and the number of a case say what
it does: --only N runs case N alone and prints all that it printed. --out keeps the folders of the cases that fail.
Prints a Markdown summary by kind; exit code 1 if any case failed.
"""

import argparse
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SPARE_BYTES = 6 * 2**30
"""What a case may map beyond what the process maps when it begins."""


@dataclass(frozen=True)
class Kind:
    """A kind of input. `spoil`: spoils the inputs in the current folder; returns what it did and more arguments."""

    name: str
    commands: tuple[Any, ...]
    spoil: Callable[[random.Random], tuple[str, list[str]]]


@dataclass(frozen=True)
class Ending:
    """How a command ended. `code`: its exit code, negative: the signal that ended it; None: it took too long."""

    code: int | None
    seconds: float
    out: str
    err: str

    def fault(self, leftovers: list[str]) -> str:
        """Returns what is wrong with it; "" if nothing is."""
        messages = [line for line in self.err.splitlines() if line.lower().startswith("error:")]
        if self.code in (None, -signal.SIGXCPU):
            return f"not ended after {self.seconds:.0f} s"
        if "Traceback (most recent call last)" in self.err:
            return f"traceback: {self.err.strip().splitlines()[-1][:160]}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if self.code and len(messages) != 1 and "MISSING" not in self.out:  # doctor's findings are its message
            return f"exit code {self.code} with {len(messages)} messages"
        return f"left {', '.join(leftovers)}" if leftovers else ""


def kinds() -> list[Kind]:
    """Returns all kinds of inputs with the commands that read them."""
    from tools.fuzz import commands, material
    from tools.fuzz.mutations import odd_override, spoil_file

    def files(*patterns: str) -> Callable[[random.Random], tuple[str, list[str]]]:
        def spoil(draw: random.Random) -> tuple[str, list[str]]:
            done = []
            for _ in range(draw.choice((1, 1, 1, 2))):
                found = sorted(path for pattern in patterns for path in Path().glob(pattern) if not path.is_dir())
                if found:
                    path = draw.choice(found)
                    done.append(f"{path}: {spoil_file(path, draw)}")
            return "; ".join(done), []

        return spoil

    def arguments(draw: random.Random) -> tuple[str, list[str]]:
        names = material.override_names()
        given = [odd_override(names, draw) for _ in range(draw.choice((1, 1, 2)))]
        return " ".join(f"{one:.60}" for one in given), given

    dry_run, *_ = commands.DRY_RUNS
    frozen, prompts = commands.FROZEN, (commands.PROMPTS, dry_run)
    weights = ("megatron/*.*", "megatron/weights/*", "megatron/weights/.*")
    run_files = ("run/*", "run/rollouts/*", "run/checkpoints/*/*")
    done_files = ("done/*.*", "done/views/*", "done/trace/*")
    return [
        Kind("configuration", (*commands.DRY_RUNS, frozen), files("run.toml")),
        Kind("command line", (*commands.DRY_RUNS, frozen), arguments),
        Kind("model", (dry_run, commands.TO_MEGATRON, commands.PROMPTS), files("model/*")),
        Kind("Megatron checkpoint", (commands.TO_HF,), files(*weights)),
        Kind("prompts", prompts, files("prompts.jsonl")),
        Kind("prompts in Parquet", (commands.PARQUET_PROMPTS,), files("prompts.parquet")),
        Kind("unfinished run", (commands.RESUME, dry_run, frozen), files(*run_files)),
        Kind("run to report", (commands.REPORT, commands.REPORT_OF_BOTH), files(*done_files)),
        Kind("bank", (commands.GAIN,), files("bank/*", "bank/scores/*")),
    ]


def run_forked(work: Callable[[], None], seconds: float) -> Ending:
    """Returns how `work` ended in a forked process with limited memory.

    It is killed after `seconds` of processor time, or five times as long: a busy machine is no fault of the input.
    """
    begin = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os._exit(_exit_code(work, seconds))
        code = None
        while code is None and time.monotonic() < begin + 5 * seconds:
            ended, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
            time.sleep(0.005)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ending(code, time.monotonic() - begin, *texts)


def _exit_code(work: Callable[[], None], seconds: float) -> int:
    """Runs `work` in the forked process; returns the exit code that the interpreter would give it."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + SPARE_BYTES, mapped + SPARE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
    code = 0
    try:
        work()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run_case(kind: Kind, name: str, good: Path, seconds: float) -> tuple[str, Ending, str]:
    """Runs one case in a copy of `good`, the current directory; returns what was spoiled, the ending and the fault."""
    shutil.copytree(good, ".", dirs_exist_ok=True, symlinks=True)
    draw = random.Random(name)
    what, more = kind.spoil(draw)
    command = draw.choice(kind.commands)
    before = set(Path().rglob("*"))
    ending = run_forked(lambda: command.run(more), seconds)
    new = set(Path().rglob("*")) - before
    leftovers = sorted(str(path) for path in new if path.name.endswith((".partial", ".replaced")))
    return f"{command.name}; {what}", ending, ending.fault(leftovers)


def run_cases(numbers: range, seed: int, good: Path, seconds: float, out: Path | None, *, is_single: bool) -> list[str]:
    """Runs the cases, prints a summary by kind and the faults; returns the faults."""
    all_kinds, faults, counts = kinds(), [], Counter()
    home = Path.cwd()
    for number in numbers:
        kind = all_kinds[number % len(all_kinds)]
        with tempfile.TemporaryDirectory(prefix="fuzz_case_") as folder:
            os.chdir(folder)
            what, ending, fault = run_case(kind, f"{seed}:{number}", good, seconds)
            os.chdir(home)
            counts[kind.name, "fault" if fault else "success" if not ending.code else "refused"] += 1
            if not number % 50:
                print(f"at case {number}", file=sys.stderr, flush=True)
            if is_single:
                print(what, ending.out, ending.err, f"exit code {ending.code}, {ending.seconds:.1f} s", sep="\n")
            if fault:
                faults.append(f"case {number}: {kind.name}: {what}: {fault}")
                print(faults[-1], file=sys.stderr, flush=True)
                if out is not None:
                    shutil.copytree(folder, out / f"case_{seed}_{number}", symlinks=True, dirs_exist_ok=True)
    print("| Input | Cases | Accepted | Refused | Faults |\n|---|---|---|---|---|")
    for kind in all_kinds:
        row = [counts[kind.name, ending] for ending in ("success", "refused", "fault")]
        print(f"| {kind.name} | {sum(row)} | {' | '.join(map(str, row))} |")
    return faults


def make_good(folder: Path, seconds: float) -> None:
    """Writes the good inputs into `folder`; raises AssertionError if a command refuses them."""
    from tools.fuzz import commands, material

    home = Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    material.make_material(folder)
    ending = run_forked(commands.convert_model, 10 * seconds)
    assert not ending.code, ending.err
    os.chdir(home)
    for command in {command.name: command for kind in kinds() for command in kind.commands}.values():
        with tempfile.TemporaryDirectory(prefix="fuzz_good_") as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            os.chdir(copy)
            ending = run_forked(lambda command=command: command.run([]), 10 * seconds)
            os.chdir(home)
        fault = ending.fault([]) or ending.code
        assert not fault, f"{command.name}: {ending}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--only", type=int, help="the number of the one case to run")
    parser.add_argument("--out", type=Path, help="keep the folders of cases that fail here")
    parser.add_argument("--seconds", type=float, default=60.0, help="processor time that a case may take")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(ROOT))  # for tools and tests/helpers, which have the good inputs
    numbers = range(given.cases) if given.only is None else range(given.only, given.only + 1)
    with tempfile.TemporaryDirectory(prefix="fuzz_inputs_") as folder:
        good = Path(folder).resolve() / "good"
        make_good(good, given.seconds)
        out = given.out.resolve() if given.out else None
        faults = run_cases(numbers, given.seed, good, given.seconds, out, is_single=given.only is not None)
    print("\n".join(["", f"{len(faults)} faults", *faults]))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
