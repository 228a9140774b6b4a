"""The tests with the marker gpu."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_checks.task import Task

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Results:
    """How many tests passed and were skipped, and the names of those that failed."""

    passed: int
    skipped: int
    failed: list[str]


def run(task: Task) -> None:
    """Requires that every test with the marker gpu passes, and that there are some."""
    files = marked_files(ROOT / "tests")
    results = run_pytest(files, ["-m", "gpu"], task.folder / "results.xml")
    task.note(files=len(files), passed=results.passed, skipped=results.skipped)
    for name in results.failed:
        task.require(False, name)
    task.require(results.passed > 0 and not results.skipped, "expected tests that run, and none that is skipped")


def marked_files(folder: Path) -> list[Path]:
    """Returns the test files that name the marker; others may import what this machine lacks."""
    return [path for path in sorted(folder.rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]


def run_pytest(files: list[Path], options: list[str], report: Path) -> Results:
    """Runs pytest on `files`, and returns what came of the tests. Its output goes to this process's own.

    Raises:
        FileNotFoundError: pytest ended before it ran a test.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*command, *options, *map(str, files)], cwd=ROOT, check=False)
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        ends = {child.tag: child.get("message", "") for child in case}
        if "failure" in ends or "error" in ends:
            message = " ".join((ends.get("failure") or ends.get("error") or "").split())
            failed.append(f"{case.get('classname')}::{case.get('name')}: {message[:300]}")
        elif "skipped" in ends:
            skipped += 1
        else:
            passed += 1
    return Results(passed, skipped, failed)
