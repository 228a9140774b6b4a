"""What saving a run costs and how soon it goes on after a kill.

    python tools/bench_checkpoint.py CONFIG.toml [--folder DIR] [--foreground] [section.key=value ...]

Takes three steps with a checkpoint after each, kills the run, and starts it again. A step's seconds are those of its
phases but saving.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from try_faults import Trial, end_with_the_run

from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.training.checkpoint_files import CheckpointFiles

STEPS = 3
BETWEEN_SAVES = 10


def measure(config_path: Path, overrides: list[str], folder: Path, *, in_background: bool) -> None:
    """Prints one mode's seconds."""
    run = RunFolder(folder)
    settings = [
        *overrides,
        f"training.steps={STEPS + 1}",
        "optimizer.warmup_steps=0",
        "heldout.num_prompts=0",
        "checkpoint.every_steps=1",
        f"checkpoint.in_background={str(in_background).lower()}",
    ]
    trial = Trial(config_path, settings, run, STEPS + 1, run)
    files = CheckpointFiles(run.checkpoints)
    start = time.monotonic()
    process = trial.start("--fresh")
    first_start = seconds_to_step(trial, process, 1, start)
    trial.wait(process, lambda: trial.recorded() == STEPS)
    trial.kill_all(process)
    newest = files.steps()[-1]
    # What is charged to a step: ending the save of the step before the last, and beginning that of the last.
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()][1:]
    saves = [line["time/save_seconds"] for line in lines if "time/save_seconds" in line]
    steps = [sum(line[key] for key in line if key.startswith("time/") and "save" not in key) for line in lines]
    size = sum(path.stat().st_size for path in files.step_folder(newest).rglob("*"))
    step, save = statistics.median(steps), statistics.median(saves)
    print(
        f"in the {'background' if in_background else 'foreground'}: a step {step:.1f} s ({len(steps)} steps: "
        f"{', '.join(f'{seconds:.1f}' for seconds in steps)}), training waits {save:.2f} s for a save of "
        f"{size / 1e6:.0f} MB: {save / (BETWEEN_SAVES * step):.1%} of {BETWEEN_SAVES} steps",
        flush=True,
    )
    start = time.monotonic()
    process = trial.start()
    trial.wait(process, lambda: trial.recorded() == newest)  # what lay behind it is cut off
    second_start = seconds_to_step(trial, process, newest + 1, start)
    trial.kill_all(process)
    print(
        f"from the command to its first step: {first_start:.0f} s anew, {second_start:.0f} s continued",
        flush=True,
    )


def seconds_to_step(trial: Trial, process: subprocess.Popen[str], step: int, start: float) -> float:
    """From `start` to the beginning of `step`, the first that `process` takes."""
    trial.wait(process, lambda: trial.recorded() >= step)
    elapsed = time.monotonic() - start
    line = json.loads(trial.folder.metrics.read_text().splitlines()[-1])
    return elapsed - sum(line[key] for key in line if key.startswith("time/"))


def main() -> None:
    end_with_the_run()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_checkpoint"), help="is emptied first")
    parser.add_argument("--foreground", action="store_true", help="training waits for the disk")
    arguments = parser.parse_intermixed_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    measure(arguments.config, arguments.overrides, arguments.folder, in_background=not arguments.foreground)


if __name__ == "__main__":
    main()
