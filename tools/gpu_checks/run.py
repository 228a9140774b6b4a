"""Runs of checks, each in a process of its own with its own time limit."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from tools.gpu_checks.checks import Check
from tools.gpu_checks.task import Found, Task

Status = Literal["passed", "failed", "error", "timed out", "skipped", "not run"]

ROOT = Path(__file__).parents[2]
_LEAST_SECONDS = 10.0
_PATIENCE_ON_CPU = 3.0
"""Two busy cores take that much longer than the limits of a machine with a GPU allow."""
_LOG_LINES = 15


@dataclass(frozen=True)
class Outcome:
    """What came of a check. `log`: the last lines of its output, unless it passed."""

    check: str
    status: Status
    seconds: float
    proves: bool
    values: dict[str, Any]
    failures: list[str]
    why: str = ""
    log: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether something that should have been shown to be right was not."""
        return self.proves and self.status not in ("passed", "skipped")

    def record(self) -> dict[str, Any]:
        """Returns the content of its JSON line."""
        return {name: value for name, value in asdict(self).items() if value not in ("", [], {})}


def run_checks(checks: Sequence[Check], device: str, seconds: float, site: Path | None = None) -> Iterator[Outcome]:
    """Yields the outcome of each check as it ends; those for which no time is left are not run.

    Args:
        seconds: of all checks together.
        site: a folder of packages that are imported first.
    """
    deadline, environment = time.monotonic() + seconds, _environment(device, site)
    for check in checks:
        left = max(0.0, deadline - time.monotonic())
        if device == "cpu" and check.needs_gpu:
            yield Outcome(check.name, "skipped", 0.0, check.proves, {}, [], check.needs_gpu)
        elif left < min(_LEAST_SECONDS, check.seconds):
            yield Outcome(check.name, "not run", 0.0, check.proves, {}, [], f"{left:.0f} s are left")
        else:
            patience = _PATIENCE_ON_CPU if device == "cpu" else 1.0
            yield _run(check, device, min(check.seconds * patience, left), environment)


def _environment(device: str, site: Path | None) -> dict[str, str]:
    """Returns the environment of all checks. The benchmarks' cases import each other by their plain names."""
    path = [str(one) for one in (site, ROOT, ROOT / "tools") if one]
    own = {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    outer = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    return {name: value for name, value in os.environ.items() if name not in outer} | own


def _run(check: Check, device: str, seconds: float, environment: dict[str, str]) -> Outcome:
    with tempfile.TemporaryDirectory(prefix=f"check_{check.name}_", ignore_cleanup_errors=True) as name:
        task = Task(device, Path(name))
        log, start = task.folder / "log", time.monotonic()
        command = [sys.executable, "-m", "tools.gpu_checks.child", check.name, device, name]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end_all(process)
        found, took = task.found(), time.monotonic() - start
        status = _status(found, code)
        why = f"limit {seconds:.0f} s" if status == "timed out" else ""
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        shown = "" if status == "passed" else "\n".join(lines)
        return Outcome(check.name, status, round(took, 1), check.proves, found.values, found.failures, why, shown)


def _status(found: Found, code: int | None) -> Status:
    if found.failures:
        return "failed"
    if code is None:
        return "timed out"
    if code or not found.is_whole:
        return "error"
    return "passed"


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """Kills the process, if it still runs, and whatever it started."""
    if process.poll() is not None:
        return
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    process.kill()
    process.wait()
    for one in started:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
