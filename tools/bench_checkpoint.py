"""What saving a run costs, and how soon it continues after a kill.

    python tools/bench_checkpoint.py CONFIG.toml [--folder DIR] [--foreground] [--steps 3] [section.key=value ...]

Takes a few steps with a checkpoint after each, kills the run with SIGKILL, and restarts it until it is ready for its
next step. Prints the seconds of a step without saving, how long training waits for a save, a checkpoint's size, and the
seconds from the start of the command to the first step, for a fresh and for a continued run. Loading the models is
listed separately.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from try_faults import Trial, end_with_the_run

from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.training.checkpoints.files import CheckpointFiles

BETWEEN_SAVES = 10


@dataclass(frozen=True)
class Saving:
    """Seconds of each step without saving and of each save; bytes of the newest checkpoint."""

    steps: list[float]
    saves: list[float]
    size_bytes: int

    def row(self, mode: str) -> str:
        step, save = statistics.median(self.steps), statistics.median(self.saves)
        return (
            f"| {mode} | {step:.1f} | {save:.2f} | {save / (BETWEEN_SAVES * step):.2%} | {self.size_bytes / 1e6:.0f} |"
        )


@dataclass(frozen=True)
class Start:
    """Seconds from the start of the command until the first step can begin; `models`: of these, loading the models."""

    total: float
    models: float

    def row(self, name: str) -> str:
        return f"| {name} | {self.total:.1f} | {self.models:.1f} | {self.total - self.models:.1f} |"


def measure(config_path: Path, overrides: list[str], folder: Path, num_steps: int, *, in_background: bool) -> None:
    """Prints one mode's two tables."""
    run = RunFolder(folder)
    settings = [
        *overrides,
        f"training.steps={num_steps + 1}",
        "optimizer.warmup_steps=0",
        "heldout.num_prompts=0",
        "checkpoint.every_steps=1",
        f"checkpoint.in_background={str(in_background).lower()}",
        "monitoring.trace=true",
    ]
    trial = Trial(config_path, settings, run, num_steps + 1, run)
    begin = time.time()
    process = trial.start("--fresh")
    ready = ready_at(trial, process, begin)
    trial.wait(process, lambda: trial.recorded() == num_steps)
    trial.kill_all(process)
    fresh = Start(ready - begin, models_seconds(trial.log[-1]))
    saving = saving_of(run)
    begin = time.time()
    process = trial.start()
    ready = ready_at(trial, process, begin)
    trial.kill_all(process)
    (folder / "continued.log").write_text(trial.log[-1])
    continued = Start(ready - begin, models_seconds(trial.log[-1]))
    print("| Checkpoints are written | Step, s | Training waits for a save, s | Share of 10 steps | MB |")
    print("|---|---|---|---|---|")
    print(saving.row("in the background" if in_background else "in the foreground"))
    print("\n| From the command to the first step | Seconds | Of these, models | Rest |\n|---|---|---|---|")
    print(fresh.row("fresh start"))
    print(continued.row("continued after SIGKILL"), flush=True)


def saving_of(run: RunFolder) -> Saving:
    """Returns the measured times. Step n is charged for ending step n - 2's save and beginning step n - 1's."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()][1:]
    saves = [line["time/save_seconds"] for line in lines if "time/save_seconds" in line]
    steps = [sum((line[key] for key in line if key.startswith("time/") and "save" not in key), 0.0) for line in lines]
    files = CheckpointFiles(run.checkpoints)
    newest = files.step_folder(files.steps()[-1])
    return Saving(steps, saves, sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()))


def ready_at(trial: Trial, process: subprocess.Popen[str], begin: float) -> float:
    """Returns when (time.time()) the engine of the run that started at `begin` got its first weights."""
    path = trial.folder.trace / "rank_00000.jsonl"

    def first_sync() -> float | None:
        lines = path.read_text().splitlines() if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        ends = [(e["ts"] + e["dur"]) / 1e6 for e in events if e["name"] == "sync"]
        return next((end for end in ends if end > begin), None)

    trial.wait(process, lambda: first_sync() is not None)
    ready = first_sync()
    assert ready is not None, "waited for"
    return ready


def models_seconds(log: str) -> float:
    found = re.search(r"models and engine .*after (\S+) s,", log)
    assert found, f"the log does not mention the models:\n{log}"
    return float(found[1])


def main() -> None:
    end_with_the_run()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_checkpoint"), help="is emptied first")
    parser.add_argument("--foreground", action="store_true", help="training waits for the disk")
    parser.add_argument("--steps", type=int, default=3, help="number of steps, with a checkpoint after each")
    arguments = parser.parse_intermixed_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    in_background = not arguments.foreground
    measure(arguments.config, arguments.overrides, arguments.folder, arguments.steps, in_background=in_background)


if __name__ == "__main__":
    main()
